"""What --sidp sets on GPUs, and what it leaves to the user."""

from types import SimpleNamespace
from typing import Any

import pytest

from sidp_sgl.sglang_hooks.cuda_defaults import defaults

H200_MIB = 140 * 1024


def arguments(**given: Any) -> SimpleNamespace:
    unset = dict.fromkeys(
        (
            "cuda_graph_backend_prefill",
            "cuda_graph_max_bs_decode",
            "cuda_graph_bs_decode",
            "max_running_requests",
        )
    )
    return SimpleNamespace(**{"sleep_on_idle": False, **unset, **given})


def test_unset_fields_get_what_sidp_needs() -> None:
    assert defaults(arguments(), H200_MIB) == {
        "sleep_on_idle": True,
        "cuda_graph_backend_prefill": "disabled",
        "cuda_graph_max_bs_decode": 512,
    }


@pytest.mark.parametrize(
    "given",
    [{"cuda_graph_max_bs_decode": 8}, {"cuda_graph_bs_decode": [1, 2]}],
)
def test_batches_of_the_user_stay(given: dict[str, Any]) -> None:
    assert "cuda_graph_max_bs_decode" not in defaults(arguments(**given), H200_MIB)


def test_no_more_requests_than_run() -> None:
    small = defaults(arguments(max_running_requests=40), H200_MIB)
    assert small["cuda_graph_max_bs_decode"] == 40


@pytest.mark.parametrize("gpu_mib", [None, 24 * 1024])
def test_small_gpus_keep_sglangs_batches(gpu_mib: float | None) -> None:
    assert "cuda_graph_max_bs_decode" not in defaults(arguments(), gpu_mib)


def test_a_prefill_backend_of_the_user_stays() -> None:
    given = arguments(cuda_graph_backend_prefill="breakable", sleep_on_idle=True)
    assert set(defaults(given, None)) == set()
