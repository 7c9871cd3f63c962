"""The demo model as the benches use it: prompts, and the link that a step's fetches need."""

import json
from pathlib import Path

import numpy as np

CHECKPOINT = Path(__file__).parents[1] / "examples" / "demo_model" / "checkpoint"
_BYTES = 2  # of a BF16 weight


def make_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids without a shared prefix: the radix cache helps neither side."""
    return np.random.default_rng(seed).integers(4, 60, (count, length)).tolist()


def fetched_bytes(dp_size: int) -> int:
    """What a rank fetches per WaS step: the FFNs of the layers that it does not own."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    num_layers = config["num_hidden_layers"]
    block = 3 * config["hidden_size"] * config["intermediate_size"] * _BYTES
    return (num_layers - num_layers // dp_size) * block


def link_gbps(dp_size: int, seconds: float) -> float:
    """The pace of every owner's link at which all fetches of a step take `seconds`.

    An owner sends as much as a rank fetches, for d−1 ranks read 1/d of the layers from each; a
    rank alone fetches one layer at a time at the full pace. Both take the same time.
    """
    return fetched_bytes(dp_size) / seconds / 1e9
