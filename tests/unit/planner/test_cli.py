"""`sidp-sgl plan` as a user meets it: table, JSON, figure, and one line for every mistake."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sidp_sgl.cli import main
from sidp_sgl.planner.gpus import find_gpu
from sidp_sgl.planner.machine import Machine

PLAN = ["plan", "Qwen3-32B", "--gpu", "H200"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    return json.loads(run(capsys, *arguments, "--json"))


def settings_of(plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["setting"]: each for each in plan["settings"]}


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, *PLAN)
    for label in ("DP8", "TP2/DP4", "TP8", "DP attention TP1/DP8", "sharded_gpu DP8"):
        assert f"\n{label}  " in text
    for mode in ("auto", "was", "cas"):
        assert f"\nSiDP {mode} TP1/DP8  " in text
    assert "\nBest: " in text
    assert max(map(len, text.split("\nBest")[0].splitlines())) <= 110


def test_json_says_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, *PLAN, "--input-len", "3072")
    settings = settings_of(plan)
    sidp, plain = settings["SiDP was TP1/DP8"], settings["DP8"]
    block = 3 * 5120 * 25600 * 2
    assert sidp["memory"]["pooled_bytes"] == 64 * block
    assert sidp["memory"]["owned_bytes"] == 8 * block
    assert sidp["memory"]["cache_bytes"] == 3 * block and sidp["slots"] == 3
    assert plain["weight_bytes"] - sidp["weight_bytes"] == (64 - 8 - 3) * block
    gained = (64 - 8 - 3) * block / sidp["kv_bytes_per_token"]
    assert sidp["kv_tokens"] - plain["kv_tokens"] == pytest.approx(gained, abs=1)
    assert sidp["batch"] == sidp["fitting"] == sidp["kv_tokens"] // (3072 + 1024)
    assert plan["best"] in settings
    assert [row["batch"] for row in plan["steps"]][:3] == [1, 2, 4]


def test_both_sides_of_worth_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Short requests, weights that nearly fill two H100: KV cache is what is missing there."""
    short = ["--input-len", "128", "--output-len", "128"]
    worth = plan_json(capsys, "plan", "Llama-3.1-70B", "--gpu", "H100", *short)
    assert worth["worth_it"] and worth["best"] == "SiDP auto TP2/DP4"
    assert worth["reason"].startswith("SiDP auto TP2/DP4: 1.")
    small = plan_json(capsys, "plan", "Qwen3-8B", "--gpu", "H200")
    assert not small["worth_it"] and "SiDP is not worth it" in small["reason"]
    for plan in (worth, small):
        fastest = max(plan["settings"], key=lambda s: s["tokens_per_second"])
        assert settings_of(plan)[plan["best"]]["tokens_per_second"] >= (
            fastest["tokens_per_second"] / 1.02
        )


def test_it_says_how_to_start(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    short = ["--gpu", "H100", "--input-len", "128", "--output-len", "128"]
    text = run(capsys, "plan", "Llama-3.1-70B", *short, "--pool", "linear", "--slots", "4")
    sidp, plain = text.splitlines()[-2:]
    server = "python -m sglang.launch_server --model-path CHECKPOINT"
    assert sidp.startswith(f"With SiDP: {server} --tp-size 2 --dp-size 4 --sidp")
    for flag in ("--sidp-pool linear", "--sidp-cache-slots 4", "--mem-fraction-static 0.9"):
        assert flag in sidp
    assert plain.startswith(f"Without: {server} --tp-size 8 --dp-size 8 --enable-dp-attention")
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **{"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32},
        **{"num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144},
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        **{"vocab_size": 151936, "max_position_embeddings": 40960, "torch_dtype": "bfloat16"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for model in (tmp_path, tmp_path / "config.json"):
        plan = plan_json(capsys, "plan", str(model), "--gpu", "H200", "--kv-dtype", "fp8")
        for command in plan["commands"].values():
            assert f"--model-path {tmp_path} " in command
            assert "--kv-cache-dtype fp8_e4m3" in command


def test_a_model_that_fits_on_one_gpu_only_with_its_peers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = settings_of(plan_json(capsys, "plan", "Llama-3.1-70B", "--gpu", "H200", "--tp", "1"))
    assert not settings["DP8"]["fits"] and settings["SiDP auto TP1/DP8"]["fits"]
    assert {setting["tp"] for setting in settings.values()} == {1}


def test_a_batch_that_is_best_sent(capsys: pytest.CaptureFixture[str]) -> None:
    """As many requests fit as may be sent in a CaS step, and too few to hide the fetches."""
    alone = plan_json(capsys, "plan", "Llama-3.1-70B", "--gpu", "H200", "--tp", "1")
    sidp = settings_of(alone)["SiDP auto TP1/DP8"]
    assert 64 < sidp["batch"] == sidp["fitting"] <= 512 and sidp["runs"] == "cas"
    assert settings_of(alone)["SiDP was TP1/DP8"]["runs"] == "was"


def test_a_mixture_beside_its_rivals(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "plan", "DeepSeek-V3", "--gpu", "H200", "--tp", "1")
    for label in ("DP8", "EP8, DP attention TP1/DP8", "DWDP DP8", "SiDP auto TP1/DP8"):
        assert f"\n{label}  " in text
    assert text.startswith("DeepSeek-V3 (671.03 B parameters, fp8) on 8 x H200")
    assert "\nBest: EP8, DP attention TP1/DP8: SiDP is not worth it" in text and "Note" not in text
    assert max(map(len, text.split("\nBest")[0].splitlines())) <= 110


def test_one_gpu_has_nothing_to_share(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, "plan", "Qwen3-8B", "--gpu", "H200", "--num-gpus", "1")
    assert [s["setting"] for s in plan["settings"]] == ["one GPU"]
    assert plan["steps"] == [] and "SiDP" in plan["reason"]


def test_own_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({**asdict(find_gpu("H200")), "name": "mine"}))
    same = plan_json(capsys, "plan", "Qwen3-32B", "--gpu-file", str(path))
    assert same["settings"] == plan_json(capsys, *PLAN)["settings"]
    assert same["machine"]["name"] == "mine"
    slow = settings_of(plan_json(capsys, *PLAN, "--nvlink-gbps", "45"))
    fast = settings_of(plan_json(capsys, *PLAN))
    name = "SiDP auto TP1/DP8"
    assert slow[name]["fetch_seconds"] > 9 * fast[name]["fetch_seconds"]
    assert slow[name]["threshold"] > fast[name]["threshold"]


def test_calibration_file_replaces_the_gpu(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(Machine.from_gpu(find_gpu("H200")).as_json()))
    calibrated = plan_json(capsys, "plan", "Qwen3-32B", "--calibration", str(path))
    assert calibrated["settings"] == plan_json(capsys, *PLAN)["settings"]


def test_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    run(capsys, *PLAN, "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["plan"], "MODEL"),
        (["plan", "Qwen3-32B"], "--gpu is missing"),
        (["plan", "Qwen3-33B", "--gpu", "H200"], "MODEL 'Qwen3-33B'"),
        (["plan", "Qwen3-32B", "--gpu", "H2000"], "--gpu 'H2000' is unknown"),
        ([*PLAN, "--gpu-file", "x.json"], "--gpu-file"),
        (["plan", "Qwen3-32B", "--gpu-file", "/no/such"], "--gpu-file /no/such"),
        ([*PLAN, "--calibration", "/no/such"], "--calibration"),
        (["plan", "Qwen3-32B", "--calibration", "/no/such"], "sidp-sgl calibrate"),
        ([*PLAN, "--input-len", "50000"], "--input-len 50000"),
        ([*PLAN, "--input-len", "0"], "--input-len"),
        ([*PLAN, "--output-len", "-3"], "--output-len"),
        ([*PLAN, "--output-len", "1e3"], "--output-len"),
        ([*PLAN, "--mem-fraction", "1.5"], "--mem-fraction 1.5"),
        ([*PLAN, "--mem-fraction", "nan"], "--mem-fraction"),
        ([*PLAN, "--num-gpus", "1000"], "--num-gpus 1000"),
        ([*PLAN, "--tp", "3"], "--tp 3"),
        ([*PLAN, "--tp", "2", "--dp", "2"], "--dp 2"),
        ([*PLAN, "--num-gpus", "3", "--tp", "3"], "--tp 3 does not divide"),
        ([*PLAN, "--slots", "0"], "--slots"),
        (["plan", "Qwen3-235B-A22B-FP8", "--gpu", "H200", "--tp", "8"], "weight_block_size"),
        ([*PLAN, "--pool", "none"], "--pool"),
        ([*PLAN, "--dtype", "int4"], "--dtype"),
        ([*PLAN, "--hbm-gbps", "-1"], "--hbm-gbps"),
        ([*PLAN, "--hbm-gbps", "inf"], "--hbm-gbps"),
        ([*PLAN, "--plot", "/no/such/place.png"], "--plot"),
        ([*PLAN, "--plot", "plan.doc"], "--plot"),
        ([*PLAN, "--what"], "--what"),
        (["plan", "Llama-3.1-405B", "--gpu", "A100-80"], "does not fit"),
        ([*PLAN, "--mem-fraction", "0.01"], "--mem-fraction 0.01"),
        (["plam"], "plam"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "error: " in captured.err and named in captured.err


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}', "null"])
def test_a_gpu_file_that_is_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str
) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(content)
    assert main(["plan", "Qwen3-8B", "--gpu-file", str(path)]) == 2
    assert "--gpu-file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"), [("hbm_gbps", 0), ("memory_gb", "80"), ("bf16_tflops", True), ("name", 1)]
)
def test_a_gpu_file_with_a_wrong_figure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, field: str, value: Any
) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({**asdict(find_gpu("H100")), field: value}))
    assert main(["plan", "Qwen3-8B", "--gpu-file", str(path)]) == 2
    assert field in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [{"hbm_bandwidth": 0}, {"step_seconds": -1}, {"kv_bandwidth": "fast"}, {"extra": 1}]
)
def test_a_calibration_file_with_a_wrong_figure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "calibration.json"
    machine = Machine.from_gpu(find_gpu("H100"))
    path.write_text(json.dumps({"machine": {**asdict(machine), **change}}))
    assert main(["plan", "Qwen3-8B", "--calibration", str(path)]) == 2
    assert "--calibration" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "plan" in run(capsys, "--help")
    with pytest.raises(SystemExit) as end:
        main(["plan", "--help"])
    assert end.value.code == 0 and "Qwen3-235B-A22B" in capsys.readouterr().out


def test_a_plan_needs_neither_torch_nor_matplotlib() -> None:
    program = (
        "import sys; from sidp_sgl.cli import main; code = main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *PLAN], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and "Best: " in result.stdout
    assert not set(result.stderr.split()) & {"torch", "sglang", "matplotlib", "numpy"}
