"""Cores and pretended memory of CPU ranks, and the platform as SGLang asks it."""

import inspect
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.platforms.interface import SRTPlatform

from sidp_sgl.sglang_hooks.cpu import cores as cpu_cores
from sidp_sgl.sglang_hooks.cpu import memory as cpu_memory
from sidp_sgl.sglang_hooks.cpu import platform as cpu_platform
from sidp_sgl.sglang_hooks.cpu.cores import plan_cores

CORES = st.sets(st.integers(0, 500), min_size=1, max_size=64).map(sorted)


@given(CORES, st.integers(1, 32))
def test_every_rank_has_cores_and_none_is_given_twice_while_they_last(
    cores: list[int], num_ranks: int
) -> None:
    plan = plan_cores(cores, num_ranks)
    assert len(plan) == num_ranks
    given_out = [core for rank in plan for core in rank]
    assert set(given_out) <= set(cores)
    assert len({len(rank) for rank in plan}) == 1, "equal ranks"
    if num_ranks <= len(cores):
        assert len(set(given_out)) == len(given_out)
        assert given_out == sorted(given_out), "contiguous"
        assert len(cores) - len(given_out) < num_ranks, "no more left over than needed"
    else:
        uses = [given_out.count(core) for core in cores]
        assert max(uses) - min(uses) <= 1


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Neither variable is set, whatever this process has done before; all is put back."""
    monkeypatch.setattr(cpu_cores, "_ours", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for variable in (cpu_cores.BIND_VARIABLE, cpu_cores.THREADS_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


def test_cores_are_divided_anew_for_the_next_engine(environment: pytest.MonkeyPatch) -> None:
    cpu_cores.divide_cores(2)
    assert os.environ[cpu_cores.BIND_VARIABLE] == "0,1|2,3"
    assert os.environ[cpu_cores.THREADS_VARIABLE] == "2"
    cpu_cores.divide_cores(4)
    assert os.environ[cpu_cores.BIND_VARIABLE] == "0|1|2|3"
    assert os.environ[cpu_cores.THREADS_VARIABLE] == "1"


def test_what_the_user_has_set_stays(environment: pytest.MonkeyPatch) -> None:
    environment.setenv(cpu_cores.BIND_VARIABLE, "0-1|2-3")
    cpu_cores.divide_cores(4)
    assert os.environ[cpu_cores.BIND_VARIABLE] == "0-1|2-3"
    assert os.environ[cpu_cores.THREADS_VARIABLE] == "1"
    environment.setenv(cpu_cores.THREADS_VARIABLE, "7")
    cpu_cores.divide_cores(2)
    assert os.environ[cpu_cores.THREADS_VARIABLE] == "7"


def test_a_default_device_memory_is_enough_for_all_processes(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.delenv(cpu_memory.VARIABLE, raising=False)
    environment.setattr(cpu_memory, "_ours", None)
    environment.setattr(cpu_memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=960))
    for num_processes, expected in ((4, 60), (32, 30), (64, 15), (16, 60)):
        cpu_memory.divide_memory(num_processes)
        assert cpu_memory.device_total_bytes() == expected
    assert cpu_memory.VARIABLE not in os.environ
    environment.setenv(cpu_memory.VARIABLE, "100")
    cpu_memory.divide_memory(64)
    assert cpu_memory.device_total_bytes() == 100, "what the user has set stays"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64MiB", 64 << 20),
        ("64 mib", 64 << 20),
        ("1.5 GB", 1_500_000_000),
        ("0.5KiB", 512),
        ("1TiB", 1 << 40),
        (" 1000000 ", 1_000_000),
        ("12B", 12),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert cpu_memory.parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "MiB", "0", "0GiB", "-5MB", "1e9", "64 bits", "1,5GB", "5 PiB", "nan", "0.1B", "8G"],
)
def test_a_bad_size_names_the_variable(text: str) -> None:
    with pytest.raises(ValueError, match=cpu_memory.VARIABLE) as raised:
        cpu_memory.parse_bytes(text)
    assert repr(text) in str(raised.value)


@given(st.integers(1, 10**12))
def test_plain_bytes_are_exact(num_bytes: int) -> None:
    assert cpu_memory.parse_bytes(str(num_bytes)) == num_bytes


def test_device_size_comes_from_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_memory.VARIABLE, "64MiB")
    assert cpu_memory.device_total_bytes() == 64 << 20
    monkeypatch.delenv(cpu_memory.VARIABLE)
    assert cpu_memory.device_total_bytes() > 0


def test_what_counts_as_used() -> None:
    """Shared storage once, a buffer's whole storage, no placeholders, no views of the pool."""
    model = torch.nn.Module()
    model.embedding = torch.nn.Parameter(torch.zeros(10, 4))
    model.head = torch.nn.Parameter(model.embedding.data)
    model.placeholder = torch.nn.Parameter(torch.zeros(1000, device="meta"))
    model.pooled = torch.nn.Parameter(torch.zeros(1000))
    model.pooled.sidp_pooled = True
    model.register_buffer("rotary", torch.zeros(8, 8)[:, :4])
    assert cpu_memory.resident_bytes(model) == (40 + 64) * 4


def test_the_platform_wins_only_where_no_accelerator_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cpu_platform.activate() == cpu_platform.QUALIFIED_NAME
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu_platform.activate() is None


def test_sglangs_own_cpu_engine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert cpu_platform.activate() is None


# SGLang asks no platform that supports no speculative decoding for its backend there.
REFUSED = {"get_default_speculative_draft_attention_backend"}
ARGUMENTS: dict[str, Any] = {
    "algorithm": "NGRAM",
    "backend": "torch_native",
    "device": torch.device("cpu"),
    "kind": "mha",
    "local_rank": 0,
    "model": torch.nn.Linear(1, 1),
    "phase": "draft_decode",
    "quant": "fp8",
    "quantization": "fp8",
    "server_args": SimpleNamespace(
        **dict.fromkeys(("attention_backend", "mem_fraction_static")),
        **dict.fromkeys(("dp_size", "tp_size", "pp_size"), 1),
    ),
}


def interface() -> list[str]:
    """Every public method of SGLang's platforms."""
    return [
        name
        for name, _ in inspect.getmembers(SRTPlatform, callable)
        if not name.startswith("_") and not inspect.isclass(getattr(SRTPlatform, name))
    ]


@pytest.mark.parametrize("name", interface())
def test_every_method_of_sglang_s_platforms_is_there_or_refuses(
    name: str, environment: pytest.MonkeyPatch
) -> None:
    environment.setattr(cpu_memory, "_model", None)
    method = getattr(cpu_platform.SidpCpuPlatform(), name)
    needed = {
        parameter.name: ARGUMENTS[parameter.name]
        for parameter in inspect.signature(method).parameters.values()
        if parameter.default is parameter.empty and parameter.name != "device_id"
    }
    if name == "reindex_device_id":
        needed["device_id"] = 0
    if name in REFUSED:
        with pytest.raises(NotImplementedError):
            method(**needed)
        assert not cpu_platform.SidpCpuPlatform().supports_speculative_algorithm("DFLASH")
    else:
        method(**needed)


def test_a_rank_s_profile_is_of_its_cpu() -> None:
    platform = cpu_platform.SidpCpuPlatform()
    named = getattr(torch.profiler.ProfilerActivity, platform.get_torch_profiler_activity_str())
    assert named == platform.get_torch_profiler_activity() == torch.profiler.ProfilerActivity.CPU
