"""Values that SGLang hands on to its ranks without a check, and that would end one there or mix up
answers.

Pure: `request` is any object with the fields of a chat completion's or a completion's body.
"""

from typing import Any

_INT32 = 2**31 - 1  # tensors of sampling parameters
_MOST_CHOICES = 4096  # SGLang makes all of them at once


def out_of_bounds(request: Any, vocab_size: int) -> str | None:
    """What is wrong, with the field's name; None where nothing is."""
    bounds = {
        "top_logprobs": (0, vocab_size),
        "logprobs": (0, vocab_size),
        "n": (1, _MOST_CHOICES),
        "top_k": (-1, _INT32),
        "min_tokens": (0, _INT32),
        "max_tokens": (0, _INT32),
        "max_completion_tokens": (0, _INT32),
    }
    for name, (least, most) in bounds.items():
        value = getattr(request, name, None)
        if value is not None and not least <= value <= most:
            return f"{name} is {value}: use {least} to {most}"
    for token_id in getattr(request, "stop_token_ids", None) or ():
        if not 0 <= token_id < vocab_size:
            return f"stop_token_ids has {token_id}, which is no token: use 0 to {vocab_size - 1}"
    return _wrong_prompt(getattr(request, "prompt", None), vocab_size)


def _wrong_prompt(prompt: Any, vocab_size: int) -> str | None:
    """`prompt`: a text, token ids, or a list of either."""
    if not isinstance(prompt, list):
        return None
    prompts = [prompt] if isinstance(next(iter(prompt), None), int) else prompt
    for number, one in enumerate(prompts):
        if not one:
            return f"prompt {number} of {len(prompts)} is empty: leave it out"
        for token_id in one if isinstance(one, list) else ():
            if not 0 <= token_id < vocab_size:
                return f"prompt has {token_id}, which is no token: use 0 to {vocab_size - 1}"
    return None
