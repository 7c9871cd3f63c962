"""SGLang end to end, where its kernels load: two colocated ranks on a seeded checkpoint, in WaS and
in CaS, their tokens beside plain SGLang's."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from bench.gpu.device import Gpu

FLAGS = {"mem_fraction_static": 0.5, "max_total_tokens": 1 << 16, "cuda_graph_max_bs_decode": 8}
PLAIN_FLAGS = {"dp_size": 1, "cuda_graph_backend_prefill": "disabled"}  # as --sidp has it
SIDP_FLAGS = {"sidp": True, "sidp_colocate": True, "dp_size": 2}
MODEL, SMALLER = "Qwen3-8B", {"num_hidden_layers": 8, "vocab_size": 32768}  # 3.6 GB
MODES = {"was": "fetches", "cas": "calls"}  # what shows that a mode ran
_SCRIPT = """
import json, sys
import sglang
if __name__ == "__main__":
    keywords = json.loads(sys.argv[2])
    engine = sglang.Engine(model_path=sys.argv[1], skip_tokenizer_init=True, **keywords)
    prompts = [[(7 * row + 3 * place) % 200 + 5 for place in range(24)] for row in range(4)]
    sampling = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
    tokens = [engine.generate(input_ids=prompt, sampling_params=sampling)["output_ids"]
              for prompt in prompts]
    states = engine.get_server_info()["internal_states"]
    engine.shutdown()
    print("RESULT " + json.dumps([tokens, [state.get("sidp") for state in states]]))
"""


def _run(model: str, keywords: dict[str, Any], seconds: float) -> Any:
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:  # spawned processes import it
        script.write(_SCRIPT)
        script.flush()
        command = [sys.executable, script.name, model, json.dumps(keywords)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError((done.stdout + done.stderr)[-3000:])


def engine(gpu: Gpu) -> dict[str, Any]:
    """Plain, then --sidp in each mode, with graphs; single requests, so tokens must be equal."""
    for package in ("sglang", "sgl_kernel"):
        if importlib.util.find_spec(package) is None:
            return {"ok": None, "skipped": f"{package} is not installed"}
    if "sidp" not in entry_points(group="sglang.srt.plugins").names:
        return {"ok": None, "skipped": "sidp_sgl is not installed (pip install .)"}
    try:
        import sgl_kernel  # noqa: F401 (whether it loads with this PyTorch)
    except Exception as error:
        return {"ok": None, "skipped": f"sgl_kernel does not load: {str(error)[:300]}"}
    from bench.gpu.random_checkpoint import write_in_child
    from sidp_sgl.planner.models import read_config

    config, _ = read_config(MODEL)
    with tempfile.TemporaryDirectory() as model:
        size = write_in_child(Path(model), {**config, **SMALLER}, 0, "cuda")
        plain, _ = _run(model, {**FLAGS, **PLAIN_FLAGS}, 105.0)  # kernels are compiled
        modes = {mode: _in_mode(mode, model, plain) for mode in MODES}
    return {"weight_bytes": size, **modes, "ok": all(mode["ok"] for mode in modes.values())}


def _in_mode(mode: str, model: str, plain: Any) -> dict[str, Any]:
    """A mode that fails is a result too: the other one still runs."""
    try:
        tokens, states = _run(model, {**FLAGS, **SIDP_FLAGS, "sidp_mode": mode}, 55.0)
    except Exception as error:
        return {"error": str(error), "ok": False}
    counters = {
        name: sum(state[mode][name] for state in states) for name in (MODES[mode], "replays")
    }
    return {
        **counters,
        "tokens_equal": tokens == plain,
        "ok": tokens == plain and all(counters.values()),
    }
