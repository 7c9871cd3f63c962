"""SGLang end to end, where its kernels load: two colocated ranks on a seeded checkpoint, their
tokens beside plain SGLang's."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu.device import Gpu

FLAGS = {
    "device": "cuda",
    "mem_fraction_static": 0.5,
    "cuda_graph_backend_prefill": "disabled",
    "cuda_graph_max_bs_decode": 8,
}
SIDP_FLAGS = {"sidp": True, "sidp_mode": "was", "sidp_colocate": True, "dp_size": 2}
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


def _run(model: str, keywords: dict[str, Any]) -> Any:
    environment = {**os.environ, "SIDP_CUDA_UNVERIFIED": "1"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:  # spawned processes import it
        script.write(_SCRIPT)
        script.flush()
        command = [sys.executable, script.name, model, json.dumps(keywords)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError((done.stdout + done.stderr)[-3000:])


def engine(gpu: Gpu) -> dict[str, Any]:
    """Plain, then --sidp in was with graphs; single requests, so tokens must be equal."""
    for package in ("sglang", "sgl_kernel"):
        if importlib.util.find_spec(package) is None:
            return {"ok": None, "skipped": f"{package} is not installed"}
    try:
        import sgl_kernel  # noqa: F401 (whether it loads with this PyTorch)
    except Exception as error:
        return {"ok": None, "skipped": f"sgl_kernel does not load: {str(error)[:300]}"}
    from tests.support.checkpoints import write_checkpoint

    with tempfile.TemporaryDirectory() as directory:
        model = str(write_checkpoint(Path(directory), "qwen3", num_layers=8))
        plain, _ = _run(model, {**FLAGS, "dp_size": 1})
        tokens, states = _run(model, {**FLAGS, **SIDP_FLAGS})
    fetches = [state["was"]["fetches"] for state in states if state]
    return {
        "fetches": fetches,
        "tokens_equal": tokens == plain,
        "ok": tokens == plain and any(fetches),
    }
