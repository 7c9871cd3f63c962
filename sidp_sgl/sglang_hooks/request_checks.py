"""Requests that would end the engine, or get a neighbour's answer, are refused before they are
sent.

SGLang makes status 400 of a ValueError, on its own and the OpenAI endpoints alike; `sgl.Engine`
raises it. A request of a batch that is refused takes the batch along.
"""

from collections.abc import Sequence
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks import arguments
from sidp_sgl.sglang_hooks.required import Hook

_INT32 = 2**31 - 1  # tensors of sampling parameters
_MOST_ANSWERS = 4096  # to one prompt: SGLang makes a list of them


def check_list(obj: Any, has_media: bool) -> None:
    """Raise ValueError for a list of prompts with an empty one: a rank would mix up the answers."""
    for prompts in (obj.text, obj.input_ids):
        if not isinstance(prompts, list | tuple) or isinstance(next(iter(prompts), None), int):
            continue  # one prompt
        for number, prompt in enumerate(prompts):
            if (prompt is None or len(prompt) == 0) and not has_media:
                raise ValueError(f"prompt {number} of {len(prompts)} is empty: leave it out")


def check_number(sampling_params: Any) -> None:
    """Raise ValueError for more answers to one prompt than the main process could list."""
    each = sampling_params if isinstance(sampling_params, list) else [sampling_params]
    for params in each:
        number = params.get("n", 1) if isinstance(params, dict) else 1
        if isinstance(number, int) and number > _MOST_ANSWERS:
            raise ValueError(f"n is {number}: use {_MOST_ANSWERS} or less")


def check_tokens(token_ids: Sequence[int], vocab_size: int, what: str) -> None:
    """Raise ValueError for the first token id that the model does not have."""
    for token_id in token_ids:
        if not hasattr(token_id, "__index__") or not 0 <= token_id < vocab_size:
            raise ValueError(
                f"{what} has token id {token_id!r}, which the model does not have: use whole "
                f"numbers from 0 to {vocab_size - 1}"
            )


def check_request(
    obj: Any, token_ids: Sequence[int] | None, vocab_size: int, has_media: bool
) -> None:
    """One request, its prompt in tokens; raises ValueError."""
    if token_ids is not None and not has_media:
        if len(token_ids) == 0 and not _has_session(obj):
            raise ValueError("the prompt is empty: it has no token")
        check_tokens(token_ids, vocab_size, "the prompt")
    top_logprobs = getattr(obj, "top_logprobs_num", None) or 0
    if top_logprobs > vocab_size:
        raise ValueError(
            f"{top_logprobs} top log probabilities are more than the model has tokens: use "
            f"{vocab_size} or fewer"
        )
    for name in ("top_k", "min_new_tokens"):
        value = obj.sampling_params.get(name)
        if isinstance(value, int) and value > _INT32:
            raise ValueError(f"{name} is {value}: use {_INT32} or less")
    if obj.sampling_params.get("min_new_tokens"):  # until then these are not sampled
        check_tokens(obj.sampling_params.get("stop_token_ids") or (), vocab_size, "stop_token_ids")


def _has_session(obj: Any) -> bool:
    """Whose earlier turns may be the whole prompt."""
    return bool(getattr(obj, "session_params", None) or getattr(obj, "session_id", None))


def _has_media(manager: Any, obj: Any) -> bool:
    """A model of texts only takes no notice of images."""
    return manager.mm_processor is not None and obj.contains_mm_input()


def _generate_request(manager: Any, obj: Any, *_: Any, **__: Any) -> None:
    """`TokenizerManager.generate_request`, before anything is sent."""
    if arguments.config_of(manager.server_args) is not None:
        check_list(obj, _has_media(manager, obj))
        check_number(obj.sampling_params)


def _validate_one_request(manager: Any, obj: Any, token_ids: Sequence[int] | None) -> None:
    """`TokenizerManager._validate_one_request`: every request, once it is tokenized."""
    if arguments.config_of(manager.server_args) is not None:
        has_media = _has_media(manager, obj)
        check_request(obj, token_ids, manager.model_config.vocab_size, has_media)


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
HOOKS = [
    Hook(f"{_MANAGER}.generate_request", _generate_request, HookType.BEFORE),
    Hook(f"{_MANAGER}._validate_one_request", _validate_one_request, HookType.BEFORE),
]
