# SPDX-License-Identifier: Apache-2.0
"""Problems of the demo model: sums of three to five numbers, worked out step by step.

One problem per line, for example ``34+58+7=34+58=92;92+7=99;99``: the prompt ends at the first
``=``, the model writes the rest of the line and stops at the newline. One token per character.
"""

import random
import zlib
from collections.abc import Iterator

MIN_OPERANDS, MAX_OPERANDS = 3, 5
LARGEST_OPERAND = 99
HELD_OUT_ONE_IN = 8


def is_held_out(prompt: str) -> bool:
    """Whether a problem is kept out of training; depends on the prompt's text alone."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_ONE_IN == 0


def solve(prompt: str) -> str:
    """What follows ``prompt`` on its last line: the running sums, then the final answer."""
    problem = prompt.rpartition("\n")[2]
    total, *rest = (int(operand) for operand in problem.rstrip("=").split("+"))
    steps = []
    for operand in rest:
        steps.append(f"{total}+{operand}={total + operand}")
        total += operand
    return ";".join([*steps, str(total)])


def final_answer(output: str) -> str:
    """The final answer in a line written by ``solve`` or by the model."""
    return output.rstrip("\n").rpartition(";")[2]


def prompts(rng: random.Random, held_out: bool) -> Iterator[str]:
    """Endless random prompts from one side of the train/held-out split."""
    while True:
        count = rng.randint(MIN_OPERANDS, MAX_OPERANDS)
        operands = rng.sample(range(1, LARGEST_OPERAND + 1), count)
        prompt = "+".join(map(str, operands)) + "="
        if is_held_out(prompt) == held_out:
            yield prompt


def few_shot_header(seed: int = 0, num_tokens_min: int = 128) -> str:
    """Solved training problems, one per line, of at least ``num_tokens_min`` tokens in all."""
    header = ""
    for prompt in prompts(random.Random(f"header {seed}"), held_out=False):
        if len(header) >= num_tokens_min:
            return header
        header += prompt + solve(prompt) + "\n"


def held_out_problems(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """``n`` different held-out problems, each as its prompt and its final answer."""
    chosen: dict[str, str] = {}
    for prompt in prompts(random.Random(f"held-out {seed}"), held_out=True):
        if len(chosen) == n:
            return list(chosen.items())
        chosen[prompt] = final_answer(solve(prompt))
