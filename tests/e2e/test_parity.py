"""WaS computes what plain SGLang computes: greedy tokens and logprobs bit for bit.

Pairwise coverage over architecture, ranks, layers, placement, slots and pool; the engines
are shared by all checks. Weights differ in every layer and tensor, and the counters show that
fetches happened and that placeholders stayed empty, so that equality can't come from nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sidp_sgl.planner.deployment import REPLICAS, SIDP, Deployment, Node
from sidp_sgl.planner.gpus import find_gpu
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.memory import RankMemory, kv_bytes_per_token
from sidp_sgl.planner.models import load_model
from tests.support.checkpoints import write_checkpoint
from tests.support.engines import Answer, answer, engine, statuses

CHUNKED_PREFILL = 64
PROMPTS = [
    [7, 8, 9],
    [(11 * k) % 250 + 3 for k in range(40)],
    [(7 * k) % 250 + 3 for k in range(3 * CHUNKED_PREFILL + 5)],  # several chunks
    [(11 * k) % 250 + 3 for k in range(60)],  # shares a prefix with the second
]
# Their tokens by chunk, without those of prefixes that earlier ones have left in the cache.
PREFILLS = (3, 40, *[CHUNKED_PREFILL] * 3, 4, 20)
NEW_TOKENS = 20
SETTINGS = {"skip_tokenizer_init": True, "chunked_prefill_size": CHUNKED_PREFILL}


class Model(NamedTuple):
    architecture: str
    num_layers: int
    tied: bool


def rows_of(cas_steps: int) -> set[int]:
    """That so many steps may have had on one rank that answered all prompts: one each in decode,
    any of the chunks in prefill. Of a prompt that was answered before, one token is prefilled."""
    return {
        cas_steps - number + sum(chunks)
        for first in (PREFILLS[0], 1)
        for number in range(len(PREFILLS) + 1)
        for chunks in combinations((first, *PREFILLS[1:]), number)
    }


class Case(NamedTuple):
    model: Model
    dp_size: int
    placement: str
    slots: int | None
    pool: str


LLAMA, QWEN2, QWEN3 = Model("llama", 8, False), Model("qwen2", 7, True), Model("qwen3", 8, True)
CASES = [Case(QWEN2, 3, "interleaved", None, "linear")]
THOROUGH = [
    Case(LLAMA, 2, "contiguous", None, "ffn"),
    Case(LLAMA, 2, "interleaved", 1, "ffn"),
    Case(LLAMA, 3, "contiguous", None, "linear"),
    Case(QWEN2, 4, "interleaved", None, "linear"),
    Case(QWEN3, 4, "interleaved", None, "ffn"),
    Case(QWEN2, 2, "contiguous", 4, "ffn"),
    Case(LLAMA, 4, "contiguous", 3, "ffn"),
    Case(QWEN3, 3, "interleaved", 1, "linear"),
    Case(QWEN3, 2, "contiguous", 2, "linear"),
]


class Plain(NamedTuple):
    folder: Path
    answers: list[Answer]
    kv_tokens: int
    overlap: bool


_plain: dict[tuple[Model, int], Plain] = {}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def plain_sglang(model: Model, folder: Path, tp_size: int = 1) -> Plain:
    """Plain SGLang's answers, once per model, TP size and run."""
    if (model, tp_size) not in _plain:
        path = folder / f"{model.architecture}-{model.num_layers}"
        if not path.exists():
            write_checkpoint(
                path,
                model.architecture,
                num_layers=model.num_layers,
                tie_embeddings=model.tied,
            )
        with engine(path, tp_size=tp_size, **SETTINGS) as running:
            answers = [answer(running, prompt, NEW_TOKENS) for prompt in PROMPTS]
            state = running.get_server_info()["internal_states"][0]
        assert "sidp" not in state
        _plain[model, tp_size] = Plain(
            path,
            answers,
            state["memory_usage"]["token_capacity"],
            not state["disable_overlap_schedule"],
        )
    return _plain[model, tp_size]


@pytest.fixture(
    scope="module",
    params=[*CASES, *(pytest.param(case, marks=pytest.mark.thorough) for case in THOROUGH)],
    ids=lambda case: "-".join(map(str, case[1:])),
)
def pooled(request: Any, checkpoints: Path) -> Iterator[tuple[Case, Plain, Any]]:
    case = request.param
    plain = plain_sglang(case.model, checkpoints)
    with engine(
        plain.folder,
        dp_size=case.dp_size,
        sidp=True,
        sidp_mode="was",
        sidp_placement=case.placement,
        sidp_cache_slots=case.slots,
        sidp_pool=case.pool,
        **SETTINGS,
    ) as running:
        yield case, plain, running


def test_pooled_engine_equals_plain_sglang(pooled: tuple[Case, Plain, Any]) -> None:
    case, plain, running = pooled
    assert plain.overlap, "the overlap scheduler must be on"
    before = statuses(running)
    for rank in range(case.dp_size):
        for prompt, expected in zip(PROMPTS, plain.answers, strict=True):
            assert answer(running, prompt, NEW_TOKENS, rank) == expected
    check_mechanism(case, before, statuses(running))
    check_capacity(plain, statuses(running))
    check_checkpoint_bytes(case, plain, statuses(running))


def check_mechanism(case: Case, before: list[dict], after: list[dict]) -> None:
    """Fetches happened, as many as the schedule says; placeholders never held memory."""
    layers = set(range(case.model.num_layers))
    assert set().union(*(set(status["owned_layers"]) for status in after)) == layers
    for old, new in zip(before, after, strict=True):
        fetched_layers = len(layers) - len(new["owned_layers"])
        tensors_per_layer = {"ffn": 2, "linear": 4}[case.pool]
        if case.model.architecture == "qwen2" and case.pool == "linear":
            tensors_per_layer += 1  # the bias of qkv_proj
        assert new["placeholders_unmaterialised"] == fetched_layers * tensors_per_layer
        steps = new["iterations"]["was"] - old["iterations"]["was"]
        assert steps >= len(PROMPTS) * NEW_TOKENS
        fetches = new["was"]["fetches"] - old["was"]["fetches"]
        if new["cache_slots"] == fetched_layers:
            assert fetches == 0 and new["was"]["fetches"] == fetched_layers  # all stay resident
        else:
            assert fetches == steps * fetched_layers
        block = new["pooled_bytes"] // len(layers)
        checked = new["self_check"]
        assert (checked["blocks"], checked["bytes"]) == (fetched_layers, fetched_layers * block)
        assert new["was"]["bytes"] == new["was"]["fetches"] * block
        assert new["was"]["resyncs"] == 0


def check_capacity(plain: Plain, after: list[dict]) -> None:
    """KV capacity grows by exactly what was freed, through SGLang's own profiling."""
    config = json.loads((plain.folder / "config.json").read_text())
    per_token = kv_bytes_per_token(
        config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"], 2
    )
    planned = {kind: planned_kv_tokens(plain, after[0], kind) for kind in (REPLICAS, SIDP)}
    assert plain.kv_tokens == pytest.approx(planned[REPLICAS], rel=0.01)
    fullest = min(status["kv_capacity_tokens"] for status in after)
    assert fullest == pytest.approx(planned[SIDP], rel=0.01)
    for status in after:
        fields = ("replicated_bytes", "pooled_bytes", "owned_bytes", "cache_bytes", "staging_bytes")
        memory = RankMemory(16 << 20, 0.9, **{name: status[name] for name in fields})
        assert status["kv_capacity_tokens"] == pytest.approx(memory.kv_tokens(per_token), rel=0.001)
        full = RankMemory(16 << 20, 0.9, status["replicated_bytes"], status["pooled_bytes"])
        assert plain.kv_tokens == pytest.approx(full.kv_tokens(per_token), rel=0.001)


def planned_kv_tokens(plain: Plain, status: dict, kind: str) -> int:
    """What the planner has to say, from the checkpoint's config.json and the settings alone."""
    node = Node(
        load_model(str(plain.folder)),
        replace(Machine.from_gpu(find_gpu("H200")), memory_bytes=16 << 20),
        status["dp_size"],
        pool=status["pool"],
        slots=status["cache_slots"],
        placement=status["placement"],
    )
    mode = "was" if status["staging_bytes"] == 0 else "auto"
    return Deployment(node, kind, 1, status["dp_size"], mode if kind == SIDP else "").kv_tokens()


def check_checkpoint_bytes(case: Case, plain: Plain, after: list[dict]) -> None:
    """Each rank read its own and the replicated tensors, and no byte more."""
    from safetensors import safe_open

    sizes = {}
    for path in plain.folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                sizes[name] = tensor.numel() * tensor.element_size()
    parts = ["mlp."] + (["proj."] if case.pool == "linear" else [])
    for status in after:
        foreign = [
            name
            for name in sizes
            if ".layers." in name
            and int(name.split(".layers.")[1].split(".")[0]) not in status["owned_layers"]
            and any(part in name for part in parts)
        ]
        expected = sum(sizes.values()) - sum(sizes[name] for name in foreign)
        assert foreign and status["checkpoint_bytes_read"] == expected
