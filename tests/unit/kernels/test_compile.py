"""Every kernel compiles for a GPU, which the interpreter does not show; and what the order of
memory depends on is in the code."""

from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from sidp_sgl.kernels import copies, flags, rows, tickets

HOPPER = GPUTarget("cuda", 90, 32)
WORDS, INDEX, NUMBER, LONG = "*i64", "*i32", "i32", "i64"
CONSTANTS = {"CLOCK": True, "PROGRAMS": 16, "WORDS": 8192, "BLOCK": 1024}
KERNELS: dict[Any, list[str]] = {
    flags._signal: [WORDS],
    flags._wait: [WORDS, WORDS, WORDS, NUMBER, LONG, "CLOCK"],
    tickets._take: [WORDS, WORDS, LONG, "CLOCK"],
    tickets._end: [WORDS, WORDS],
    copies._copy: [INDEX, INDEX, NUMBER, "fp32", "PROGRAMS", "WORDS", "CLOCK"],
    copies._mark: [WORDS, "CLOCK"],
    copies._until: [WORDS, NUMBER, "CLOCK"],
    rows._pack: [INDEX, INDEX, INDEX, INDEX, NUMBER, "BLOCK"],
    rows._scatter: [INDEX, WORDS, INDEX, INDEX, INDEX, NUMBER, "BLOCK"],
}


def ptx(kernel: Any) -> str:
    types = dict(zip(kernel.arg_names, KERNELS[kernel], strict=True))
    constants = {name: CONSTANTS[name] for name in types if name in CONSTANTS}
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return compile(source, target=HOPPER, options={"num_warps": 4}).asm["ptx"]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_it_compiles(kernel: Any) -> None:
    assert ".entry" in ptx(kernel)


def test_signals_release_and_looks_acquire_at_system_scope() -> None:
    assert "atom.global.sys.release.add" in ptx(flags._signal)
    assert "sys.acquire" in ptx(flags._wait)
    taken = ptx(tickets._take)
    assert "sys.acquire" in taken and "acq_rel.sys.cas" in taken
    ended = ptx(tickets._end)
    assert "acq_rel.sys.cas" in ended and "sys.release.max" in ended


def test_waits_look_at_the_clock() -> None:
    for kernel in (flags._wait, tickets._take, copies._until, copies._copy):
        assert "%globaltimer" in ptx(kernel) and "nanosleep" in ptx(kernel)
