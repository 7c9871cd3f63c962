"""What a job's results depend on: kept beside the output, so that a job continues as it began.

How the engine is spread over devices (ranks, --sidp, memory, schedule) may change
between two runs of one job; what a request is answered with may not.
"""

import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from sidp_sgl.batch.errors import JobError
from sidp_sgl.batch.input import Contents
from sidp_sgl.batch.output import sync_directory
from sidp_sgl.config import flag_name
from sidp_sgl.errors import SidpUsageError

SUFFIX = ".state"
_FORMAT = 1
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


class StateFile:
    """Lies beside the output; there from before the first record on."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(output.name + SUFFIX)
        self._output = output

    def exists(self) -> bool:
        return self.path.exists()

    def write(self, contents: Contents, settings: Mapping[str, str]) -> None:
        """At once or not at all; raises JobError."""
        state = {"format": _FORMAT, "input": contents._asdict(), "settings": dict(settings)}
        new = self.path.with_name(self.path.name + ".new")
        try:
            with open(new, "wb") as file:
                file.write(orjson.dumps(state, option=orjson.OPT_INDENT_2) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise JobError(f"{self.path}: {error.strerror}") from None

    def compare(self, contents: Contents, settings: Mapping[str, str]) -> None:
        """Raises SidpUsageError naming what is not as it was when the job began."""
        try:
            state = orjson.loads(self.path.read_bytes())
            is_known = state["format"] == _FORMAT
            before, began_with = state["input"], state["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            is_known = False
        if not is_known:
            raise SidpUsageError(
                f"{self.path} is no state of a job that this version can read: restore it, or use "
                "another --output-file"
            )
        changes = [
            f"{name} was {began_with.get(name, 'absent')}, is {settings.get(name, 'absent')}"
            for name in sorted({*began_with, *settings})
            if began_with.get(name) != settings.get(name)
        ]
        if before != contents._asdict():
            changes.insert(
                0,
                f"the input had {before['num_requests']:,} requests and {before['num_bytes']:,} "
                f"bytes, has {contents.num_requests:,} and {contents.num_bytes:,}"
                + (", with other content" if before["num_bytes"] == contents.num_bytes else ""),
            )
        if changes:
            raise SidpUsageError(
                f"--output-file {self._output} was begun with other settings: "
                f"{'; '.join(changes)}; use those again, or another --output-file"
            )
