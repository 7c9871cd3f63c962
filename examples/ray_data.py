"""A job that outgrows one machine: Ray Data over engines with SiDP, one per node.

`python -m examples.ray_data` runs two engines of two ranks on this machine. On a cluster, where
`ray.init()` finds it, `--engines` is the number of nodes, `--dp-size` that of a node's GPUs, and
`--device cuda` has Ray give every engine all GPUs of a node. Engines share nothing: a group lies
on one node, and Ray Data hands out batches of prompts, restarts what dies, and writes as it goes.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import ray

from examples.demo_model.arithmetic import few_shot_header, held_out_problems

CHECKPOINT = Path(__file__).parent / "demo_model" / "checkpoint"


class Generate:
    """One actor of Ray with one engine, which lives as long as the actor."""

    def __init__(self, engine: dict[str, Any], sampling: dict[str, Any]) -> None:
        import sglang  # in the actor: the driver needs no accelerator

        self.engine = sglang.Engine(**engine)
        self.sampling = sampling

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        outputs = self.engine.generate(list(batch["prompt"]), self.sampling)
        states = self.engine.get_server_info()["internal_states"]
        fetched = sum(state["sidp"]["was"]["fetches"] for state in states)
        num = len(outputs)
        return {
            **batch,
            "output": np.array([output["text"] for output in outputs]),
            "engine": np.array([ray.get_runtime_context().get_actor_id()] * num),
            "blocks_fetched": np.array([fetched] * num),
        }

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.shutdown()


def run(
    dataset: "ray.data.Dataset", engines: int, batch_size: int, **engine: Any
) -> "ray.data.Dataset":
    """`dataset` with a column `prompt` → the same with `output`; `engine`: of `sgl.Engine`."""
    num_ranks = engine["dp_size"]
    return dataset.map_batches(
        Generate,
        fn_constructor_args=({"sidp": True, **engine}, {"temperature": 0, "max_new_tokens": 96}),
        batch_size=batch_size,  # large: an engine keeps its ranks' batches full by itself
        compute=ray.data.ActorPoolStrategy(size=engines),
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
        print(row["prompt"].removeprefix(header) + row["output"])
    print(f"{len(results)} outputs of {len({row['engine'] for row in results})} engines")


if __name__ == "__main__":
    main()
