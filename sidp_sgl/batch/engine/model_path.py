"""A model that does not exist is said so in one line, before the engine starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.scheduler.lifecycle.liveness import one_line

_FLAGS = ("--model", "--model-path")


def check_path(arguments: Sequence[str]) -> None:
    """Of a command line, before the imports of SGLang; raises SidpUsageError."""
    model = _model_of(arguments)
    if model is not None and _is_path(model) and not Path(model).exists():
        raise _error(model, "there is no such folder")


def check_config(server_args: Any) -> None:
    """Reads the model's config as the engine will; raises SidpUsageError."""
    from sglang.srt.utils.hf_transformers_utils import get_config

    model = server_args.model_path
    if "://" in model:
        return  # the engine fetches it
    try:
        get_config(
            model,
            trust_remote_code=server_args.trust_remote_code,
            revision=server_args.revision,
            model_config_parser=server_args.model_config_parser,
        )
    except Exception as error:
        raise _error(model, one_line(error)) from None


def _error(model: str, reason: str) -> SidpUsageError:
    return SidpUsageError(
        f"--model-path {model} can't be used ({reason}): give a folder with a config.json, or the "
        "name of a model on the Hugging Face Hub"
    )


def _model_of(arguments: Sequence[str]) -> str | None:
    model = None
    for place, argument in enumerate(arguments):
        flag, has_value, value = argument.partition("=")
        if flag in _FLAGS:
            following = arguments[place + 1 : place + 2]
            model = value if has_value else next(iter(following), None)
    return model


def _is_path(model: str) -> bool:
    """Names on the Hub have one slash, and no dots before it."""
    return "://" not in model and (model.startswith(("/", ".")) or model.count("/") > 1)
