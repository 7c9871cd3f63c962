"""Writes the problems of the task `sums` from the demo model's arithmetic, as JSON lines.

`sums.fewshot.jsonl`: training problems, for the header that all prompts share;
`sums.test.jsonl`: held-out problems; `sharegpt.json`: the same for SGLang's own benchmarks.
Run it as `python -m examples.evaluation.make_data`.
"""

import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from examples.demo_model.arithmetic import final_answer, held_out_problems, prompts, solve

FOLDER = Path(__file__).parent
NUM_FEWSHOT, NUM_TEST = 6, 256


def rows(problems: Iterable[str]) -> Iterator[dict[str, Any]]:
    """One per problem: its worked solution among three whose final answer is wrong."""
    rng = random.Random("choices")
    for problem in problems:
        solution = solve(problem)
        answer = final_answer(solution)
        steps = solution.removesuffix(answer)
        wrong = rng.sample([offset for offset in range(-20, 21) if offset], 3)
        choices = [f"{steps}{int(answer) + offset}" for offset in (0, *wrong)]
        rng.shuffle(choices)
        yield {
            "problem": problem,
            "solution": solution,
            "choices": choices,
            "right": choices.index(solution),
        }


def files() -> dict[str, str]:
    """Name → content."""
    fewshot = islice(prompts(random.Random("few-shot"), held_out=False), NUM_FEWSHOT)
    test = [problem for problem, _ in held_out_problems(NUM_TEST, seed=1)]
    conversations = [
        {"conversations": [{"value": problem}, {"value": solve(problem)}]} for problem in test
    ]
    lines = {
        f"sums.{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows(problems))
        for name, problems in (("fewshot", fewshot), ("test", test))
    }
    return {**lines, "sharegpt.json": json.dumps(conversations, indent=0) + "\n"}


def main() -> None:
    for name, content in files().items():
        (FOLDER / name).write_text(content)


if __name__ == "__main__":
    main()
