"""Every kernel compiles for a GPU, which the interpreter does not show; and what the order of
memory depends on is in the code."""

from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from sidp_sgl.kernels import pacing, ticket_lock

HOPPER = GPUTarget("cuda", 90, 32)
KERNELS: dict[Any, list[str]] = {
    ticket_lock._acquire: ["i64", "*i64", "i64", "CLOCK"],
    ticket_lock._release: ["i64", "*i64"],
    pacing._mark: ["*i64", "CLOCK"],
    pacing._until: ["*i64", "i32", "CLOCK"],
}


def ptx(kernel: Any) -> str:
    types = dict(zip(kernel.arg_names, KERNELS[kernel], strict=True))
    constants = {name: True for name in types if name == "CLOCK"}
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return compile(source, target=HOPPER, options={"num_warps": 4}).asm["ptx"]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_it_compiles(kernel: Any) -> None:
    assert ".entry" in ptx(kernel)


def test_the_lock_acquires_and_releases_at_system_scope() -> None:
    acquired = ptx(ticket_lock._acquire)
    assert "sys.acquire" in acquired and "global.acq_rel.sys.cas" in acquired
    released = ptx(ticket_lock._release)
    assert "global.acq_rel.sys.cas" in released and "global.sys.release.max" in released


def test_waits_look_at_the_clock() -> None:
    for kernel in (ticket_lock._acquire, pacing._until):
        assert "%globaltimer" in ptx(kernel) and "nanosleep" in ptx(kernel)
