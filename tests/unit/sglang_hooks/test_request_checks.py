"""What would end a rank is refused with a ValueError, and everything else passes."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import GenerateReqInput

from sidp_sgl.config import SidpConfig
from sidp_sgl.sglang_hooks import arguments, request_checks

VOCAB = 64
tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8)
outside = st.integers(max_value=-1) | st.integers(min_value=VOCAB)


def manager(has_sidp: bool = True, sees: bool = False) -> Any:
    server_args = SimpleNamespace()
    if has_sidp:
        config = SidpConfig(sidp=True).of_engine("group", "auto", is_server=True)
        arguments.attach(server_args, config)
    return SimpleNamespace(
        server_args=server_args,
        model_config=SimpleNamespace(vocab_size=VOCAB),
        mm_processor="some" if sees else None,
    )


def check(has_sidp: bool = True, sees: bool = False, **fields: Any) -> None:
    """A request on its way, as SGLang calls the hooks; texts have a token per character."""
    obj = GenerateReqInput(**fields)
    checked = manager(has_sidp, sees)
    request_checks._generate_request(checked, obj, None)
    obj.normalize_batch_and_arguments()
    for one in [obj] if obj.is_single else [obj[number] for number in range(obj.batch_size)]:
        token_ids = [ord(c) % VOCAB for c in one.text] if one.text is not None else one.input_ids
        request_checks._validate_one_request(checked, one, token_ids)


@given(st.lists(tokens, min_size=1, max_size=4))
def test_prompts_of_the_model_s_tokens_pass(prompts: list[list[int]]) -> None:
    check(input_ids=prompts)
    check(input_ids=prompts[0])
    check(text=["x" * len(prompt) for prompt in prompts])
    check(text="x")


@given(st.lists(tokens, max_size=3), st.integers(0, 3), st.booleans())
def test_an_empty_prompt_in_a_list_is_named(
    prompts: list[list[int]], place: int, is_text: bool
) -> None:
    place = min(place, len(prompts))
    prompts.insert(place, [])
    fields = {"text": ["x" * len(p) for p in prompts]} if is_text else {"input_ids": prompts}
    with pytest.raises(ValueError, match=f"prompt {place} of {len(prompts)} is empty"):
        check(**fields)


def test_an_empty_text_without_a_token_is_refused() -> None:
    """With one, a BOS of the tokenizer, it is a prompt like any other."""
    with pytest.raises(ValueError, match="the prompt is empty"):
        check(text="")
    request_checks._validate_one_request(
        manager(), GenerateReqInput(text="", sampling_params={}), [1]
    )


def test_a_session_may_be_the_whole_prompt() -> None:
    check(input_ids=[], session_params={"id": "one"}, sampling_params={})


@given(tokens, tokens, outside, st.booleans())
def test_a_token_that_the_model_does_not_have_is_named(
    before: list[int], neighbour: list[int], bad: int, is_list: bool
) -> None:
    prompt = [*before, bad]
    with pytest.raises(ValueError, match=rf"token id {bad}, .* from 0 to {VOCAB - 1}"):
        check(input_ids=[neighbour, prompt] if is_list else prompt)


@pytest.mark.parametrize("fields", [{"text": ""}, {"input_ids": [5, VOCAB]}])
def test_an_image_excuses_only_where_the_model_sees(fields: dict[str, Any]) -> None:
    check(sees=True, image_data="x", **fields)
    with pytest.raises(ValueError, match="the prompt"):
        check(image_data="x", **fields)


@pytest.mark.parametrize("bad", ["1", 1.5, None])
def test_a_token_that_is_no_number_is_named(bad: Any) -> None:
    with pytest.raises(ValueError, match="use whole numbers"):
        check(input_ids=[1, bad])


def test_more_log_probabilities_than_tokens() -> None:
    check(text="x", return_logprob=True, top_logprobs_num=VOCAB)
    with pytest.raises(ValueError, match="65 top log probabilities"):
        check(text="x", return_logprob=True, top_logprobs_num=VOCAB + 1)


@pytest.mark.parametrize("name", ["top_k", "min_new_tokens"])
def test_what_no_tensor_of_sampling_parameters_holds(name: str) -> None:
    check(text="x", sampling_params={name: 2**31 - 1})
    with pytest.raises(ValueError, match=f"{name} is {2**31}: use {2**31 - 1} or less"):
        check(text="x", sampling_params={name: 2**31})


def test_stop_tokens_that_are_held_back() -> None:
    """A stop token that another model has is harmless, unless SGLang has to suppress it."""
    stop = {"stop_token_ids": [VOCAB]}
    check(text="x", sampling_params=stop)
    with pytest.raises(ValueError, match="stop_token_ids has token id 64"):
        check(text="x", sampling_params={**stop, "min_new_tokens": 2})


@pytest.mark.parametrize("fields", [{"text": ["x", ""]}, {"input_ids": [VOCAB]}])
def test_without_sidp_nothing_is_refused(fields: dict[str, Any]) -> None:
    check(has_sidp=False, **fields)


@pytest.mark.parametrize("in_list", [True, False])
def test_more_answers_than_can_be_listed(in_list: bool) -> None:
    params = {"n": 10**9}
    with pytest.raises(ValueError, match="n is 1000000000: use 4096 or less"):
        check(text=["x"] if in_list else "x", sampling_params=[params] if in_list else params)
    check(text="x", sampling_params={"n": 2})
