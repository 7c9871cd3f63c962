"""A job that outgrows one machine: Ray Data over engines with SiDP, one per node.

`python -m examples.ray_data` runs two engines of two ranks on this machine. On a cluster, where
`ray.init()` finds it, `--engines` is the number of nodes, `--dp-size` that of a node's GPUs, and
`--device cuda` has Ray give every engine all GPUs of a node. Engines share nothing: a group lies
on one node, and Ray Data hands out batches of prompts, restarts what dies, and writes as it goes.

A row that can't be answered has its reason in the column `error`. An actor whose engine loses a
rank ends itself; Ray starts another, which runs the actor's unfinished batches again.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from examples.demo_model.arithmetic import few_shot_header, held_out_problems
from sidp_sgl.scheduler.lifecycle.liveness import RankFailure

CHECKPOINT = Path(__file__).parent / "demo_model" / "checkpoint"
BATCH_RETRIES = 3  # a batch that ends its engine every time ends the job


class Generate:
    """One actor of Ray with one engine, which lives as long as the actor."""

    def __init__(self, engine: dict[str, Any], sampling: dict[str, Any]) -> None:
        import sglang  # in the actor: the driver needs no accelerator

        self.engine = sglang.Engine(**engine)
        self.sampling = sampling

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        try:
            return self._generate(batch)
        except RankFailure as failure:
            # Ray restarts an actor whose process ends; an exception would end the dataset.
            print(failure, file=sys.stderr, flush=True)
            os._exit(1)

    def _generate(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        answers = self.engine.loop.run_until_complete(self._answers(batch["prompt"]))
        states = self.engine.get_server_info()["internal_states"]
        fetched = sum(state["sidp"]["was"]["fetches"] for state in states)
        engine = f"{ray.util.get_node_ip_address()}:{os.getpid()}"
        return {
            **batch,
            "output": np.array([output for output, _ in answers]),
            "error": np.array([error for _, error in answers]),
            "engine": np.array([engine] * len(answers)),
            "blocks_fetched": np.array([fetched] * len(answers)),
        }

    async def _answers(self, prompts: Iterable[str]) -> list[tuple[str, str]]:
        return await asyncio.gather(*(self._answer(prompt) for prompt in prompts))

    async def _answer(self, prompt: str) -> tuple[str, str]:
        """Output and error of one row, a request of its own: its neighbours don't notice."""
        try:
            answer = await self.engine.async_generate(prompt, self.sampling)
        except RankFailure:
            raise
        except Exception as error:
            return "", str(error) or repr(error)
        reason = answer["meta_info"]["finish_reason"]
        return answer["text"], reason["message"] if reason["type"] == "abort" else ""

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.shutdown()


def run(
    dataset: "ray.data.Dataset", engines: int, batch_size: int, **engine: Any
) -> "ray.data.Dataset":
    """`dataset` with a column `prompt` → the same with `output` and `error` (empty if all is well).

    `engine`: keywords of `sgl.Engine`.
    """
    num_ranks = engine["dp_size"]
    return dataset.map_batches(
        Generate,
        fn_constructor_args=({"sidp": True, **engine}, {"temperature": 0, "max_new_tokens": 96}),
        batch_size=batch_size,  # large: an engine keeps its ranks' batches full by itself
        compute=ray.data.ActorPoolStrategy(size=engines),
        max_task_retries=BATCH_RETRIES,  # after an actor's end
        **({"num_gpus": num_ranks} if engine["device"] == "cuda" else {"num_cpus": 1}),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default=str(CHECKPOINT))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--dp-size", type=int, default=2)
    parser.add_argument("--problems", type=int, default=128)
    args = parser.parse_args()

    header = few_shot_header()
    rows = [{"prompt": header + problem} for problem, _ in held_out_problems(args.problems)]
    results = run(
        ray.data.from_items(rows),
        args.engines,
        batch_size=max(1, args.problems // (2 * args.engines)),
        model_path=args.model_path,
        device=args.device,
        dp_size=args.dp_size,
    ).take_all()
    for row in results[:4]:
        print(row["prompt"].removeprefix(header) + (row["output"] or row["error"]))
    print(f"{len(results)} outputs of {len({row['engine'] for row in results})} engines")


if __name__ == "__main__":
    main()
