"""Starts real SGLang engines for the end-to-end tests and asks them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import sglang

from bench.offline import shut_down, start_engine

DEVICE_MEMORY = "16MiB"


class Answer(NamedTuple):
    """Greedy output of one request."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@contextmanager
def engine(model_path: Any, **keywords: Any) -> Iterator[sglang.Engine]:
    """A real engine on CPU ranks of a pretended size; shut down at the end."""
    # One thread per rank, whatever the number of ranks: the same sums in the same order.
    cores = sorted(os.sched_getaffinity(0))
    num_processes = keywords.get("dp_size", 1) * keywords.get("tp_size", 1)
    bind = "|".join(str(cores[rank % len(cores)]) for rank in range(num_processes))
    with patch.dict(
        os.environ,
        SIDP_CPU_DEVICE_MEMORY=os.environ.get("SIDP_CPU_DEVICE_MEMORY", DEVICE_MEMORY),
        SGLANG_CPU_OMP_THREADS_BIND=bind,
        OMP_NUM_THREADS="1",
    ):
        running = start_engine(model_path=str(model_path), random_seed=1, **keywords)
    try:
        yield running
    finally:
        shut_down(running)


def answer(
    running: sglang.Engine, prompt: list[int], max_new_tokens: int, dp_rank: int | None = None
) -> Answer:
    """One request alone in the engine, on a given rank."""
    output = running.generate(
        input_ids=prompt,
        sampling_params={"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True},
        return_logprob=True,
        routed_dp_rank=dp_rank,
    )
    logprobs = [entry[0] for entry in output["meta_info"]["output_token_logprobs"]]
    return Answer(tuple(output["output_ids"]), tuple(logprobs))


def statuses(running: sglang.Engine) -> list[dict[str, Any]]:
    """The `sidp` dictionary of every rank, by rank."""
    states = running.get_server_info()["internal_states"]
    return sorted((state["sidp"] for state in states), key=lambda status: status["dp_rank"])
