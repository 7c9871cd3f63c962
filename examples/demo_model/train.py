# SPDX-License-Identifier: Apache-2.0
"""Trains a demo model, a small Qwen3 that adds numbers step by step, and writes its checkpoint.

``train.py`` trains the dense model; ``train.py --model moe --steps 300 --long-steps 100
--learning-rate 1e-3`` makes a mixture of experts out of what is stored of it. Either is stored and
evaluated; with ``--eval-only`` only evaluated.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from arithmetic import few_shot_header, final_answer, held_out_problems, prompts, solve
from models import EOS, TOKEN_ID, build_dense, build_mixture, save_checkpoint
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

FOLDERS = {
    model: Path(__file__).parent / name for model, name in (("dense", "checkpoint"), ("moe", "moe"))
}
MAX_OUTPUT_TOKENS = 64
NO_LOSS = -100  # the target that cross_entropy ignores
SHORT_WINDOW, LONG_WINDOW = 128, 448  # tokens; most is learnt from the short, cheap ones


def window_of(source: Iterator[str], length: int) -> tuple[list[int], list[int]]:
    """Consecutive problems as ``length`` inputs and targets; only the solutions carry loss."""
    tokens, targets = [], []
    while len(tokens) <= length:
        prompt = next(source)
        solution = [TOKEN_ID[character] for character in solve(prompt) + EOS]
        tokens += [TOKEN_ID[character] for character in prompt] + solution
        targets += [NO_LOSS] * len(prompt) + solution
    return tokens[:length], targets[1 : length + 1]


def batch_of(source: Iterator[str], size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*(window_of(source, length) for _ in range(size)), strict=True)
    return torch.tensor(inputs), torch.tensor(targets)


def learning_rate(progress: float, peak: float, warmup: float = 0.03) -> float:
    """A linear warm-up, then a cosine down to a hundredth of ``peak``."""
    if progress < warmup:
        return peak * progress / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * (0.01 + 0.99 * cosine)


@torch.inference_mode()
def solved_fraction(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """The fraction of windows in which the model's first choices solve every problem."""
    choices = model(input_ids=inputs, use_cache=False).logits.argmax(-1)
    return ((choices == targets) | (targets == NO_LOSS)).all(-1).float().mean().item()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    if args.model == "dense":
        model = build_dense()
    else:
        dense = AutoModelForCausalLM.from_pretrained(FOLDERS["dense"], dtype=torch.float32)
        model = build_mixture(dense)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    source = prompts(random.Random(args.seed), held_out=False)
    held_out_source = prompts(random.Random(args.seed), held_out=True)
    held_out = batch_of(held_out_source, args.batch_size, LONG_WINDOW)
    started = time.monotonic()
    for step in range(args.steps + args.long_steps):
        if step < args.steps:
            inputs, targets = batch_of(source, args.batch_size, SHORT_WINDOW)
        else:
            inputs, targets = batch_of(source, args.batch_size // 2, LONG_WINDOW)
        rate = learning_rate(step / (args.steps + args.long_steps), args.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.save_every == 0:
            save_checkpoint(model, FOLDERS[args.model])
            print(
                f"step {step + 1} after {time.monotonic() - started:.0f} s: "
                f"loss {loss.item():.5f}, "
                f"held-out windows solved {solved_fraction(model, *held_out):.1%}",
                flush=True,
            )
    save_checkpoint(model, FOLDERS[args.model])


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> tuple[list[str], list[int], torch.Tensor]:
    """Greedy outputs, their lengths in tokens, and the top-1 to top-2 margin at each token."""
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    result = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        do_sample=False,
        max_new_tokens=MAX_OUTPUT_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = result.sequences[:, encoded["input_ids"].shape[1] :]
    lengths = (tokens != tokenizer.pad_token_id).sum(-1)
    best_two = torch.stack(result.logits, dim=1).float().topk(2).values
    written = torch.arange(tokens.shape[1]) < lengths[:, None]
    margins = (best_two[..., 0] - best_two[..., 1])[written]
    return tokenizer.batch_decode(tokens, skip_special_tokens=True), lengths.tolist(), margins


def evaluate(args: argparse.Namespace) -> None:
    """Prints how the stored checkpoint does on held-out problems behind one shared header."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS[args.model])
    header = few_shot_header(args.seed, args.header_tokens)
    problems = held_out_problems(args.problems, args.seed)
    print(f"{len(problems)} held-out problems behind a header of {len(header)} tokens")
    all_outputs = []
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(FOLDERS[args.model], dtype=dtype)
        outputs, lengths, margins = [], [], []
        for start in range(0, len(problems), args.eval_batch_size):
            batch = problems[start : start + args.eval_batch_size]
            texts = [header + prompt for prompt, _ in batch]
            some_outputs, some_lengths, some_margins = generate(model, tokenizer, texts)
            outputs += some_outputs
            lengths += some_lengths
            margins.append(some_margins)
        margin = torch.cat(margins)
        right = sum(
            final_answer(output) == answer
            for output, (_, answer) in zip(outputs, problems, strict=True)
        )
        print(
            f"{dtype}: exact match {right / len(problems):.2%}; "
            f"logit margin min {margin.min():.2f}, 1st percentile {margin.quantile(0.01):.2f}; "
            f"output tokens mean {sum(lengths) / len(lengths):.1f}, "
            f"min {min(lengths)}, max {max(lengths)}"
        )
        all_outputs.append(outputs)
    same = sum(one == other for one, other in zip(*all_outputs, strict=True))
    print(f"the same text in both: {same / len(problems):.2%}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=FOLDERS, default="dense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3000, help="steps on short windows")
    parser.add_argument("--long-steps", type=int, default=800, help="then on long windows")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("--problems", type=int, default=512, help="held-out problems to evaluate")
    parser.add_argument("--header-tokens", type=int, default=192, help="at least")
    parser.add_argument("--eval-batch-size", type=int, default=64)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if not args.eval_only:
        train(args)
    evaluate(args)


if __name__ == "__main__":
    main()
