"""Which deployments there are on a node: every split, with and without SiDP."""

from collections.abc import Iterator

from sidp_sgl.config import MODES
from sidp_sgl.errors import SidpUsageError
from sidp_sgl.planner.deployment import (
    DP_ATTENTION,
    DWDP,
    REPLICAS,
    SHARDED_GPU,
    SIDP,
    Deployment,
    Node,
)
from sidp_sgl.planner.weights import Split, check_split


def deployments(node: Node, tp: int | None = None, dp: int | None = None) -> Iterator[Deployment]:
    """All that can be compared on the node, in the order of growing oddity; `tp` and `dp` narrow
    them down. Raises SidpUsageError where nothing is left."""
    splits = _splits(node, tp, dp)
    for tensor, data in splits:
        yield Deployment(node, REPLICAS, tensor, data)
    shared = [(tensor, data) for tensor, data in splits if data > 1]
    for tensor, data in shared:
        attention = Deployment(node, DP_ATTENTION, tensor, data)
        if _divides(node, attention.split):
            yield attention
    for _, data in (split for split in shared if split[0] == 1):
        yield Deployment(node, SHARDED_GPU, 1, data)
    num_experts = node.shape.num_experts
    for _, data in (split for split in shared if split[0] == 1):
        if num_experts and num_experts % data == 0:
            yield Deployment(node, DWDP, 1, data)
    for tensor, data in shared:
        for mode in MODES:
            yield Deployment(node, SIDP, tensor, data, mode)


def _splits(node: Node, tp: int | None, dp: int | None) -> list[tuple[int, int]]:
    num = node.num_gpus
    for flag, given in (("--tp", tp), ("--dp", dp)):
        if given is not None and (given < 1 or num % given):
            raise SidpUsageError(
                f"{flag} {given} does not divide the {num} GPUs of --num-gpus: change one of them"
            )
    if tp and dp and tp * dp != num:
        raise SidpUsageError(
            f"--tp {tp} times --dp {dp} is not --num-gpus {num}: change one of them, or leave "
            "--dp out"
        )
    wanted = [tp] if tp else [num // dp] if dp else [n for n in range(1, num + 1) if num % n == 0]
    splits = [(n, num // n) for n in wanted if _divides(node, Split.of(n))]
    if not splits:
        check_split(node.shape, Split.of(wanted[0]))
    return splits


def _divides(node: Node, split: Split) -> bool:
    try:
        check_split(node.shape, split)
    except SidpUsageError:
        return False
    return True
