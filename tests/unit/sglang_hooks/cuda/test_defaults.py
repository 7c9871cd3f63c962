"""What --sidp sets on GPUs, and what it leaves to the user."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.model_executor import cuda_graph_config
from sglang.srt.plugins import load_plugins

from sidp_sgl.sglang_hooks import arguments
from sidp_sgl.sglang_hooks.cuda import refusals
from sidp_sgl.sglang_hooks.cuda.defaults import defaults
from tests.support.checkpoints import write_checkpoint

H200_MIB = 140 * 1024


def fields(**given: Any) -> SimpleNamespace:
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
    assert defaults(fields(), H200_MIB) == {
        "sleep_on_idle": True,
        "cuda_graph_backend_prefill": "disabled",
        "cuda_graph_max_bs_decode": 512,
    }


@pytest.mark.parametrize(
    "given",
    [{"cuda_graph_max_bs_decode": 8}, {"cuda_graph_bs_decode": [1, 2]}],
)
def test_batches_of_the_user_stay(given: dict[str, Any]) -> None:
    assert "cuda_graph_max_bs_decode" not in defaults(fields(**given), H200_MIB)


def test_no_more_requests_than_run() -> None:
    small = defaults(fields(max_running_requests=40), H200_MIB)
    assert small["cuda_graph_max_bs_decode"] == 40


@pytest.mark.parametrize("gpu_mib", [None, 24 * 1024])
def test_small_gpus_keep_sglangs_batches(gpu_mib: float | None) -> None:
    assert "cuda_graph_max_bs_decode" not in defaults(fields(), gpu_mib)


def test_a_prefill_backend_of_the_user_stays() -> None:
    given = fields(cuda_graph_backend_prefill="breakable", sleep_on_idle=True)
    assert set(defaults(given, None)) == set()


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_sglang_resolves_them(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a large GPU, which SGLang's own defaults would capture prefill graphs for."""
    load_plugins()
    monkeypatch.setattr(refusals, "has_gpu", lambda: True)
    monkeypatch.setenv("SIDP_CPU_DEVICE_MEMORY", f"{H200_MIB}MiB")
    monkeypatch.setattr(cuda_graph_config, "default_prefill_backend", lambda: "breakable")
    model = write_checkpoint(tmp_path, "qwen3", num_layers=4)
    server_args = arguments._server_args_from_keywords(
        model_path=str(model),
        device=device,
        dp_size=2,
        sidp=True,
        skip_tokenizer_init=True,
        attention_backend="triton",
    )
    server_args.resolve_once()
    resolved = resolved_view(server_args)
    assert resolved.device == "cuda" and resolved.sleep_on_idle
    graphs = resolved.cuda_graph_config
    assert (graphs.prefill.backend, graphs.decode.backend) == ("disabled", "full")
    assert max(graphs.decode.bs) == 512
