"""The kernels on a GPU where there is one, else under Triton's interpreter, which has to be asked
for before triton is imported: these tests run in a process of their own (`make unit`)."""

import os
import sys

import pytest
import torch
from hypothesis import settings

settings.register_profile("kernels", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("kernels")

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU or os.environ.get("TRITON_INTERPRET") == "1":
        return
    reason = "triton was imported without its interpreter: run pytest tests/kernels by itself"
    for item in items:
        if "tests/kernels" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that run out do so at once; the interpreter counts looks instead of time."""
    from sidp_sgl.kernels import ticket_lock

    monkeypatch.setattr(ticket_lock, "POLLS", 3)
