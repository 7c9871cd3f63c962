"""What does not go with --sidp is refused in one line with flag, reason and remedy, before
anything is started: on `sgl.Engine` as an exception, on a command line as `error: …`."""

import argparse
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sglang

from sidp_sgl.config import SidpConfig, flag_name
from sidp_sgl.errors import SidpError, SidpUsageError
from sidp_sgl.sglang_hooks import arguments, refusals, required
from sidp_sgl.weightpool.placement import Placement
from tests.support.checkpoints import write_checkpoint

BAD_SETTINGS = [
    ({"dp_size": 1}, "--dp-size"),
    ({"tp_size": 2, "enable_layernorm_sp": True}, "--enable-layernorm-sp"),
    ({"tp_size": 2, "enable_symm_mem": True}, "--enable-symm-mem"),
    ({"pp_size": 2}, "--pp-size"),
    ({"enable_dp_attention": True, "tp_size": 1}, "--enable-dp-attention"),
    ({"nnodes": 2}, "--nnodes"),
    ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm"),
    ({"enable_lora": True}, "--enable-lora"),
    ({"enable_memory_saver": True}, "--enable-memory-saver"),
    ({"weight_cache_mode": "daemon"}, "--weight-cache-mode"),
    ({"cpu_offload_gb": 1}, "--cpu-offload-gb"),
    ({"offload_group_size": 2}, "--offload-group-size"),
    ({"enable_torch_compile": True}, "--enable-torch-compile"),
    ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap"),
    ({"enable_pdmux": True}, "--enable-pdmux"),
    ({"enable_nvidia_megakernel": True}, "--enable-nvidia-megakernel"),
    ({"dwdp_size": 2}, "--dwdp-size"),
    ({"elastic_ep_backend": "mooncake"}, "--elastic-ep-backend"),
    ({"disaggregation_mode": "prefill"}, "--disaggregation-mode"),
    ({"use_ray": True}, "--use-ray"),
    ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num"),
    ({"enable_eplb": True}, "--enable-eplb"),
    ({"ep_num_redundant_experts": 2}, "--ep-num-redundant-experts"),
    ({"moe_a2a_backend": "deepep"}, "--moe-a2a-backend"),
    ({"kt_weight_path": "x"}, "--kt-weight-path"),
    ({"load_format": "dummy"}, "--load-format"),
    ({"device": "cuda"}, "--device"),
    ({"sidp_colocate": True}, "--sidp-colocate"),
    ({"sidp_pool": "everything"}, "--sidp-pool"),
    ({"sidp_mode": "fast"}, "--sidp-mode"),
    ({"sidp_batch_threshold": 0}, "--sidp-batch-threshold"),
    ({"sidp_batch_threshold": "8", "sidp_mode": "cas"}, "--sidp-batch-threshold"),
    ({"sidp_placement": "random"}, "--sidp-placement"),
    ({"sidp_cache_slots": 0}, "--sidp-cache-slots"),
    ({"sidp_cache_slots": 7}, "--sidp-cache-slots"),
    ({"sidp_link_gbps": -1}, "--sidp-link-gbps"),
    ({"sidp": False, "sidp_pool": "linear"}, "--sidp-pool"),
    ({"sidp": False, "sidp_batch_threshold": 8}, "--sidp-batch-threshold"),
    ({"sidp_slots": 3}, "sidp_slots"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_layers=8)


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: Any, **__: Any) -> None:
        raise AssertionError("processes were about to be started")

    monkeypatch.setattr(sglang.Engine, "_launch_scheduler_processes", launch)


def start(checkpoint: Path, **keywords: Any) -> None:
    defaults = {"device": "cpu", "dp_size": 2, "sidp": True, "skip_tokenizer_init": True}
    sglang.Engine(model_path=str(checkpoint), **{**defaults, **keywords})


@pytest.mark.parametrize(("keywords", "flag"), BAD_SETTINGS, ids=lambda v: str(v)[:40])
def test_engine_refuses(checkpoint: Path, keywords: dict[str, Any], flag: str) -> None:
    with pytest.raises(SidpError) as caught:
        start(checkpoint, **keywords)
    message = str(caught.value)
    assert flag in message and "\n" not in message
    assert any(
        word in message for word in ("use", "drop", "choose", "needs", "add", "takes", "leave")
    )


def test_every_rule_has_a_case() -> None:
    covered = {name for keywords, _ in BAD_SETTINGS for name in keywords}
    same_flag_elsewhere = {"ep_size", "attn_dp_size", "attn_cp_size", "lora_paths", "encoder_only",
                           "grpc_mode", "smg_grpc_mode", "startup_weight_load_mode"}  # fmt: skip
    rules = [*refusals.RULES, *refusals.TP_RULES]
    assert {rule.field for rule in rules} - same_flag_elsewhere <= covered


def test_rules_name_fields_that_sglang_has() -> None:
    from sglang.srt.server_args import ServerArgs

    fields = set(ServerArgs.__struct_fields__)
    assert {rule.field for rule in [*refusals.RULES, *refusals.TP_RULES]} <= fields


def test_checkpoints_without_safetensors_or_quantised_otherwise(
    tmp_path: Path, checkpoint: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "config.json", bare)
    with pytest.raises(SidpUsageError, match="safetensors"):
        start(bare)
    quantised = tmp_path / "quantised"
    shutil.copytree(checkpoint, quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        SidpUsageError,
        match="is quantised by bitsandbytes, whose weights --sidp can't pool: use fp8",
    ):
        start(quantised)


def test_device_memory_that_is_no_size(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDP_CPU_DEVICE_MEMORY", "lots")
    with pytest.raises(SidpUsageError, match="SIDP_CPU_DEVICE_MEMORY='lots' is not a size"):
        start(checkpoint, sidp=False)


@pytest.mark.parametrize(("slots", "warned"), [(None, False), (4, True)])
def test_warns_where_nothing_is_freed(
    slots: int | None, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(refusals.logger, "warning", lambda text, *_: warnings.append(text))
    config = SidpConfig(sidp=True, sidp_cache_slots=slots)
    refusals.warn_of_no_gain(Placement.of([1] * 8, 2, config.sidp_cache_slots))
    assert bool(warnings) == warned


def test_another_sglang_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(required, "sglang_version", "0.5.22")
    with pytest.raises(SidpError, match=r"made for SGLang 0\.5\.23, found 0\.5\.22; install"):
        start(checkpoint)


@pytest.mark.parametrize(
    ("flags", "mode", "threshold"),
    [
        ([], "auto", "auto"),
        (["--sidp-mode", "cas"], "cas", "auto"),
        (["--sidp-batch-threshold", "auto"], "auto", "auto"),
        (["--sidp-batch-threshold", "24"], "auto", 24),
    ],
)
def test_flags_become_the_config(flags: list[str], mode: str, threshold: int | str) -> None:
    parser = argparse.ArgumentParser()
    arguments._add_flags(None, parser)
    config = SidpConfig.from_values(vars(parser.parse_args(["--sidp", *flags])))
    assert (config.sidp_mode, config.sidp_batch_threshold) == (mode, threshold)


def command_line(monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """Exit status of `python -m sglang.launch_server`."""
    monkeypatch.setattr(sys, "argv", ["launch_server", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("sglang.launch_server", run_name="__main__")
    return ended.value.code


def test_command_line_refuses_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--model-path", str(checkpoint), "--device", "cpu")
    assert command_line(monkeypatch, *model, "--sidp") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and "--dp-size 2 or more" in errors[0]


def test_help_shows_the_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for name in SidpConfig.flags():
        assert f"{flag_name(name)} " in shown
    assert "--sidp-batch-threshold {auto,N}" in shown
