"""Decode steps of SGLang itself, without SiDP: what schedulers, layers and attention take.

The only file here that uses SGLang. Two depths of one model, with weights that SGLang
makes up, tell what a step costs from what a layer does; every rank runs the same batch.
"""

import asyncio
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from sidp_sgl.planner.calibrate.points import StepPoint

DEPTHS = (2, 8)
SHORT, LONG = 24, 384  # tokens of prompts
LOADS = ((1, SHORT), (2, SHORT), (8, SHORT), (32, SHORT), (1, LONG), (12, LONG))
_STEPS = 26
_WINDOW = 4  # steps whose mean SGLang notes
_SPECIAL = 16  # token ids below may have a meaning
_PER_LAYER = ("layer_types", "max_window_layers", "sliding_window_pattern")


def measure_steps(
    config: dict[str, Any], num_ranks: int, device: str
) -> tuple[list[StepPoint], int]:
    """The points of all depths and loads, and what SGLang finds free on a device, in bytes."""
    points: list[StepPoint] = []
    for depth in DEPTHS:
        with tempfile.TemporaryDirectory(prefix="sidp-calibration-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(with_depth(config, depth)))
            with _engine(folder, num_ranks, device) as engine:
                for batch, prompt in LOADS:
                    if prompt + _STEPS < config["max_position_embeddings"]:
                        # The better of two: a disturbance may last as long as a run.
                        seconds = min(
                            _step_seconds(engine, num_ranks, batch, prompt, config)
                            for _ in range(2)
                        )
                        points.append(StepPoint(depth, batch, prompt + _STEPS / 2, seconds))
    return points, _free_memory(device)


def with_depth(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """`config` of a model with `depth` layers."""
    kept = {name: value for name, value in config.items() if name not in _PER_LAYER}
    return {**kept, "num_hidden_layers": depth}


@contextmanager
def _engine(folder: str, num_ranks: int, device: str) -> Iterator[Any]:
    with patch.dict(os.environ, SGLANG_RECORD_STEP_TIME="1", PYTHONWARNINGS="ignore"):
        with warnings.catch_warnings():  # of accelerators that are not there
            warnings.simplefilter("ignore")
            import sglang
            from sglang.srt.managers.load_snapshot import shm_path_for
        engine = sglang.Engine(
            model_path=folder,
            load_format="dummy",
            dtype="bfloat16",
            device=device,
            dp_size=num_ranks,
            skip_tokenizer_init=True,
            decode_log_interval=_WINDOW,
            log_level="error",
            random_seed=0,
        )
    try:
        yield engine
    finally:
        engine.shutdown()
        # Plain SGLang leaves it behind.
        Path(shm_path_for(engine.port_args.instance_id)).unlink(missing_ok=True)


def _step_seconds(
    engine: Any, num_ranks: int, batch: int, prompt: int, config: dict[str, Any]
) -> float:
    """Median over the ranks' windows of steps; the first of each may begin in the prefill."""
    before = _windows(engine, batch)
    engine.flush_cache()
    token = _tokens(batch * num_ranks, prompt, config["vocab_size"])
    sampling = {"temperature": 0, "max_new_tokens": _STEPS, "ignore_eos": True}

    async def run() -> None:
        await asyncio.gather(
            *(
                engine.async_generate(
                    input_ids=next(token), sampling_params=sampling, routed_dp_rank=rank
                )
                for rank in range(num_ranks)
                for _ in range(batch)
            )
        )

    engine.loop.run_until_complete(run())
    after = _windows(engine, batch)
    new = [
        window
        for rank, windows in after.items()
        for window in windows[len(before.get(rank, [])) + 1 :]
    ]
    if not new:
        raise RuntimeError(f"SGLang noted no step of batch {batch}")
    return statistics.median(new)


def _windows(engine: Any, batch: int) -> dict[str, list[float]]:
    """Every rank's windows at `batch`. Ranks come in any order: their start-up times name them."""
    times = {
        repr(state["startup_time"]): state["step_time_dict"]
        for state in engine.get_server_info()["internal_states"]
    }
    return {rank: each.get(batch, each.get(str(batch), [])) for rank, each in times.items()}


def _tokens(count: int, length: int, vocab_size: int) -> Iterator[list[int]]:
    """Prompts of which no two begin alike, as far as the vocabulary goes: no prefix is cached."""
    span = max(1, vocab_size - _SPECIAL)
    for number in range(count):
        yield [_SPECIAL + (number * 7919 + place * (number + 1)) % span for place in range(length)]


def _free_memory(device: str) -> int:
    """Bytes that a rank finds before it loads weights."""
    if device == "cpu":  # what the platform pretends, or its share of the machine
        from sglang.srt.platforms import current_platform

        return int(current_platform.get_device_total_memory())
    return int(torch.cuda.mem_get_info(0)[0])
