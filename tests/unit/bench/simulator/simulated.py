"""Small deployments for the simulator's tests, whose steps take round numbers of seconds."""

from bench.simulator import Job, Lengths, Request, make_requests
from sidp_sgl.planner.deployment import REPLICAS, SIDP, Deployment, Node
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import ModelShape
from sidp_sgl.planner.weights import Split, kv_bytes, part_bytes

FAST = 1e30  # bytes or FLOP per second: what takes no time
SHAPE = ModelShape(
    name="tiny",
    model_type="llama",
    num_layers=8,
    hidden_size=64,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=256,
    max_position=1 << 20,
)


def machine(kv_tokens: int, step_seconds: float = 1.0, link: float = FAST) -> Machine:
    """A GPU with room for all of SHAPE's weights and `kv_tokens`, that only overheads keep busy."""
    weights = part_bytes(SHAPE, Split()).total
    memory = weights + kv_tokens * kv_bytes(SHAPE, 1, "bf16")
    return Machine("GPU", memory, FAST, FAST, FAST, FAST, link, 0, 0, 0, 0, 0, step_seconds)


def deployment(
    kv_tokens: int, dp: int = 1, kind: str = REPLICAS, mode: str = "", **machine_fields: float
) -> Deployment:
    """`kv_tokens` are those of a plain rank."""
    node = Node(SHAPE, machine(kv_tokens, **machine_fields), dp, mem_fraction=1.0)
    return Deployment(node, kind, 1, dp, mode)


def sidp(kv_tokens: int, dp: int, mode: str = "auto", **machine_fields: float) -> Deployment:
    return deployment(kv_tokens, dp, SIDP, mode, **machine_fields)


def request(
    number: int, input_len: int, output_len: int, arrival: float = 0.0, limit: int | None = None
) -> Request:
    return Request(number, arrival, input_len, output_len, limit or output_len)


def requests_of(
    num_requests: int, inputs: float, outputs: float, rate: float | None = None, seed: int = 0
) -> list[Request]:
    """With log-normal lengths; outputs at most four times their mean."""
    lengths = [Lengths("log-normal", mean, 0.7, round(4 * mean)) for mean in (inputs, outputs)]
    return make_requests(Job(num_requests, *lengths, rate), seed)
