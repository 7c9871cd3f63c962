"""Offline inference with `sgl.Engine` and SiDP: `python -m examples.offline`.

Any other model and device: `--model-path Qwen/Qwen3-32B --device cuda --dp-size 8`.
"""

import argparse

import sglang as sgl

from examples.demo_model.arithmetic import few_shot_header, held_out_problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", default="examples/demo_model/checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dp-size", type=int, default=4)
    args = parser.parse_args()

    header = few_shot_header()
    prompts = [header + problem for problem, _ in held_out_problems(32)]
    engine = sgl.Engine(
        model_path=args.model_path, device=args.device, dp_size=args.dp_size, sidp=True
    )
    try:
        # All at once: the ranks' batches grow as far as their KV cache allows.
        outputs = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 96})
        for prompt, output in list(zip(prompts, outputs, strict=True))[:4]:
            print(prompt.removeprefix(header) + output["text"])
        for state in engine.get_server_info()["internal_states"]:
            sidp = state["sidp"]
            print(
                f"rank {sidp['dp_rank']}: owns layers {sidp['owned_layers']}, "
                f"{sidp['kv_capacity_tokens']:,} KV tokens, {sidp['iterations']}"
            )
    finally:
        engine.shutdown()


if __name__ == "__main__":  # SGLang spawns its processes
    main()
