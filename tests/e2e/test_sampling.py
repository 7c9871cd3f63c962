"""Sequence-parallel sampling with plain TP: what TP ranks sample together is what each of them
would sample alone, to the bit; and the counters say which way it was."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

from bench.demo_job import CHECKPOINT
from examples.demo_model.arithmetic import held_out_problems
from tests.support.engines import engine

PROMPTS = [prompt for prompt, _ in held_out_problems(5)]  # odd: the shares of two ranks differ
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
EDITED = {
    "frequency_penalty": 0.4,
    "presence_penalty": 0.2,
    "repetition_penalty": 1.2,
    "min_new_tokens": 4,
    "logit_bias": {"7": 4.0, "9": -2.0},
}
LOGPROBS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs",
            "input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")  # fmt: skip
# (sampling parameters, other options, the way of the decode steps)
REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "greedy": (GREEDY, {}, "argmax"),
    "greedy, logprobs": (GREEDY, {"return_logprob": True}, "split"),
    "input logprobs": (GREEDY, {"return_logprob": True, "logprob_start_len": 0}, "split"),
    "top logprobs": (
        GREEDY, {"return_logprob": True, "top_logprobs_num": 3, "logprob_start_len": 0}, "gathered",
    ),
    "token ids": (GREEDY, {"return_logprob": True, "token_ids_logprob": [3, 40]}, "gathered"),
    "edited": ({**GREEDY, **EDITED}, {"return_logprob": True}, "split"),
    "constrained": ({**GREEDY, "regex": "([0-9][=+])+"}, {"return_logprob": True}, "split"),
    "sampled of one": (
        {**GREEDY, "temperature": 0.8, "top_k": 1}, {"return_logprob": True}, "split",
    ),
    "beams": ({**GREEDY, "beam_width": 3}, {}, "gathered"),
    "custom": (
        {**GREEDY, "custom_params": {"token_ids": [5, 6, 7]}},
        {"custom_logit_processor": DisallowedTokensLogitsProcessor.to_str()},
        "gathered",
    ),
}  # fmt: skip
SETTINGS = {"tp_size": 2, "enable_custom_logit_processor": True, "mem_fraction_static": 0.8}


def ask(running: Any, name: str, prompts: Any = None) -> list[Any]:
    """Texts and logprobs, prompt by prompt."""
    sampling, options, _ = REQUESTS[name]
    outputs = running.generate(prompt=prompts or PROMPTS, sampling_params=sampling, **options)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return [
        (output["text"], *(output["meta_info"].get(kind) for kind in LOGPROBS))
        for output in outputs
    ]


def steps(running: Any) -> list[dict[str, int]]:
    """Of every DP rank."""
    return [state["sidp_sampling"] for state in running.get_server_info()["internal_states"]]


def moved(before: list[dict[str, int]], after: list[dict[str, int]]) -> dict[str, int]:
    return {way: sum(s[way] for s in after) - sum(s[way] for s in before) for way in after[0]}


@pytest.fixture(scope="module")
def together() -> Iterator[Any]:
    with engine(CHECKPOINT, sidp_sampling="auto", **SETTINGS) as running:
        yield running


def test_all_ways_lead_to_the_same(together: Any) -> None:
    """The gathered one is SGLang's own, over whole rows on every rank."""
    answers = {}
    for name in ("greedy", "greedy, logprobs", "top logprobs"):
        before = steps(together)
        answers[name] = ask(together, name, PROMPTS[:1])
        went = moved(before, steps(together))
        assert went.pop(REQUESTS[name][2]) >= GREEDY["max_new_tokens"] - 1, name
        assert not any(went.values()), (name, went)
    ((text, *_),) = answers["greedy"]
    ((_, logprobs, *_),) = answers["top logprobs"]
    assert answers["greedy, logprobs"][0][:2] == (text, logprobs)
    assert answers["top logprobs"][0][0] == text


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[list[Any], list[Any]]]:
    """Plain SGLang's answers: of one request at a time, and of all at once."""
    with engine(CHECKPOINT, **SETTINGS) as running:
        states = running.get_server_info()["internal_states"]
        assert not any("sidp_sampling" in state for state in states)
        return {name: answers(running, name) for name in REQUESTS}


def answers(running: Any, name: str) -> tuple[list[Any], list[Any]]:
    ones = [answer for prompt in PROMPTS for answer in ask(running, name, [prompt])]
    return ones, ask(running, name)


@pytest.mark.thorough
@pytest.mark.parametrize("name", REQUESTS)
def test_answers_are_plain_sglang_s(alone: Any, together: Any, name: str) -> None:
    before = steps(together)
    ones, batch = answers(together, name)
    went = moved(before, steps(together))
    plain_ones, plain_batch = alone[name]
    assert ones == plain_ones
    assert [answer[0] for answer in batch] == [answer[0] for answer in plain_batch]
    assert went[REQUESTS[name][2]] > len(PROMPTS) * (GREEDY["max_new_tokens"] - 1)
    if "regex" in REQUESTS[name][0]:
        assert all(re.match("[0-9][=+]", text) for text, *_ in ones + batch)


@pytest.mark.thorough
def test_constrained_and_free_requests_share_a_batch(together: Any) -> None:
    sampling = [
        {"temperature": 1, "max_new_tokens": 12, **({"regex": "[0-9]{12}"} if number % 3 else {})}
        for number in range(12)
    ]
    before = steps(together)
    outputs = together.generate(prompt=PROMPTS[:1] * 12, sampling_params=sampling)
    assert moved(before, steps(together))["split"] > 0
    for parameters, output in zip(sampling, outputs, strict=True):
        assert "regex" not in parameters or re.fullmatch("[0-9]{12}", output["text"])


@pytest.mark.thorough
def test_scores_are_read_from_whole_rows(together: Any) -> None:
    """Requests that only score, with nothing to sample."""
    output = together.generate(
        prompt=PROMPTS[0],
        sampling_params={"temperature": 0, "max_new_tokens": 0},
        return_logprob=True,
        token_ids_logprob=[3, 40],
    )
    ((scored, *_),) = [output["meta_info"]["output_token_ids_logprobs"]]
    sampled = together.generate(
        prompt=PROMPTS[0],
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        return_logprob=True,
        token_ids_logprob=[3, 40],
    )
    assert scored == sampled["meta_info"]["output_token_ids_logprobs"][0]


@pytest.mark.thorough
def test_rows_of_the_ranks_draw_numbers_of_their_own(together: Any) -> None:
    """Nearly uniform draws: rows i and i + B/2 of equal seeds would write the same texts."""
    before = steps(together)
    sampling = {"temperature": 50.0, "max_new_tokens": 16, "ignore_eos": True}
    outputs = together.generate(prompt=PROMPTS[:1] * 32, sampling_params=sampling)
    assert moved(before, steps(together))["split"] >= sampling["max_new_tokens"]
    assert len({output["text"] for output in outputs}) == 32


@pytest.mark.thorough
def test_with_dp(alone: Any) -> None:
    with engine(CHECKPOINT, dp_size=2, sidp_sampling="sequence-parallel", **SETTINGS) as running:
        for name in ("greedy", "greedy, logprobs"):
            sampling, options, _ = REQUESTS[name]
            for rank in range(2):
                outputs = [
                    running.generate(
                        prompt=prompt, sampling_params=sampling, routed_dp_rank=rank, **options
                    )
                    for prompt in PROMPTS
                ]
                assert [output["text"] for output in outputs] == [a[0] for a in alone[name][0]]
        for ways in steps(running):
            assert ways["argmax"] > 0 and ways["split"] > 0
