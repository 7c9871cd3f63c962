"""What a job's results depend on: compared when it continues, so that it does so as it began.

How the engine is spread over devices (ranks, --sidp, memory, schedule) may change
between two runs of one job; what a request is answered with may not.
"""

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from sidp_sgl.config import flag_name

DETERMINISTIC = "--enable-deterministic-inference"
_SMALL_FILE_BYTES = 2**20  # configurations and templates: compared by content
FLAGS = (
    "model_path",
    "revision",
    "load_format",
    "tokenizer_path",
    "tokenizer_mode",
    "context_length",
    "json_model_override_args",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "served_model_name",
    "chat_template",
    "hf_chat_template_name",
    "completion_template",
    "default_chat_template_kwargs",
    "reasoning_parser",
    "tool_call_parser",
    "sampling_defaults",
    "preferred_sampling_params",
    "allow_auto_truncate",
    "lora_paths",
    "random_seed",
)


def settings_of(arguments: Mapping[str, Any]) -> dict[str, str]:
    """By flag, of SGLang's arguments as they were given; a local model also by its files."""
    settings = {flag_name(name): _text(arguments[name]) for name in FLAGS if name in arguments}
    if arguments.get("enable_deterministic_inference") or arguments.get("rl_on_policy_target"):
        settings[DETERMINISTIC] = "True"
    model = Path(str(arguments["model_path"]))
    if model.is_dir():
        settings["--model-path"] = str(model.resolve())
        settings["the model's files"] = _digest_of_files(model)
    return settings


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _digest_of_files(folder: Path) -> str:
    """Names and sizes of all files, contents of the small ones."""
    digest = blake2b(digest_size=16)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        if size <= _SMALL_FILE_BYTES:
            digest.update(path.read_bytes())
    return digest.hexdigest()
