"""--sidp on GPUs, as far as it can be tested without one: what is refused, what a process is set
to, captured steps in SGLang's graphs, ranks that share a GPU."""

import os
import pkgutil
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidp_sgl.config import SidpConfig
from sidp_sgl.errors import SidpUsageError
from sidp_sgl.sglang_hooks.cuda import colocation, process, refusals
from sidp_sgl.sglang_hooks.cuda.graphs import GraphHooks
from sidp_sgl.sglang_hooks.cuda.refusals import ONE_DEVICE, check_device
from sidp_sgl.weightpool.execution import UnitExecution
from sidp_sgl.weightpool.transport.devices import make_transport
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport


def flags(device: str, prefill: str = "disabled", decode: str = "full") -> Any:
    graphs = SimpleNamespace(
        prefill=SimpleNamespace(backend=prefill), decode=SimpleNamespace(backend=decode)
    )
    return SimpleNamespace(device=device, cuda_graph_config=graphs)


def test_which_devices_and_graphs_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SidpConfig(sidp=True)
    with pytest.raises(SidpUsageError, match="finds no GPU: use --device cpu"):
        check_device(flags("cuda"), config)
    monkeypatch.setattr(refusals, "has_gpu", lambda: True)
    check_device(flags("cuda"), config)
    check_device(flags("cuda", decode="disabled"), config)
    check_device(flags("cpu", prefill="breakable", decode="breakable"), config)
    for wrong, remedy in (
        (flags("xpu"), "use cuda or cpu"),
        (flags("cuda", prefill="breakable"), "--cuda-graph-backend-prefill=disabled"),
        (flags("cuda", decode="breakable"), "--cuda-graph-backend-decode=full"),
    ):
        with pytest.raises(SidpUsageError, match=remedy):
            check_device(wrong, config)
    monkeypatch.setenv(ONE_DEVICE, "true")
    with pytest.raises(SidpUsageError, match=f"{ONE_DEVICE}.*unset it"):
        check_device(flags("cuda"), config)
    check_device(flags("cpu"), config)


def test_a_rank_s_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")  # as SGLang has it
    interval = sys.getswitchinterval()
    try:
        process.set_up()
        assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
        assert sys.getswitchinterval() < interval
    finally:
        sys.setswitchinterval(interval)


class Pool:
    """Notes what the hooks tell it."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def begin_replay(self) -> None:
        self.seen.append("replay")

    def step(self) -> "Pool":
        return self

    def __enter__(self) -> None:
        self.seen.append("begin")

    def __exit__(self, *_: object) -> None:
        self.seen.append("end")


def test_warm_ups_and_capture_are_steps_and_a_replay_is_announced() -> None:
    pool = Pool()
    hooks = GraphHooks(pool, UnitExecution(pool))  # type: ignore[arg-type]

    def capture_one(backend: Any, key: str, forward: Any, inputs: Any = None) -> None:
        for _ in range(3):
            assert forward() == "logits"

    def forward() -> str:
        pool.seen.append("forward")
        return "logits"

    backend = SimpleNamespace(_cuda_graph_runner=SimpleNamespace(capture_bs=[2, 4]))
    key = SimpleNamespace(size=4)
    hooks._capture_one(capture_one, backend, key, forward, inputs=1)
    assert pool.seen == ["begin", "forward", "end"] * 3
    pool.seen.clear()
    assert hooks._replay(lambda _, key: pool.seen.append(f"bs={key.size}"), backend, key) is None
    assert pool.seen == ["replay", "bs=4"]


def test_every_hook_has_its_place_in_sglang() -> None:
    hooks = GraphHooks(Pool(), UnitExecution(Pool())).hooks()  # type: ignore[arg-type]
    for target, _, _ in hooks:
        assert callable(pkgutil.resolve_name(target))


def test_colocated_ranks_start_on_the_first_gpu_and_divide_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[Any] = []
    colocation.launch_on_first_gpu(
        lambda *args: launched.append(args), "controller", "args", "ports", 3, 3
    )
    assert launched == [("controller", "args", "ports", 0, 3)]
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (5 * gib, 140 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 4 * gib)
    colocation.divide_memory(2, lambda: 10 * gib)
    assert torch.cuda.mem_get_info(0) == (70 * gib - 14 * gib - colocation.CONTEXT_BYTES, 70 * gib)
    colocation.divide_memory(1000, lambda: 0)
    assert torch.cuda.mem_get_info(0)[0] == 0


def test_cpu_ranks_have_shared_memory() -> None:
    transport = make_transport("cpu", 1e9)
    assert isinstance(transport, ShmTransport)
    transport.close()
