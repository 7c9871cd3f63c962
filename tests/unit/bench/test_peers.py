"""bench.peers without GPUs: its checkpoint, its memory, and sides that fail."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bench import peers
from bench.gpu.random_checkpoint import write_checkpoint
from sidp_sgl.planner.calibrate.command import SMALL


def test_the_checkpoint_loads_and_no_two_tensors_are_alike(tmp_path: Path) -> None:
    total = write_checkpoint(tmp_path, SMALL, 0, "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tensors = dict(model.named_parameters())
    assert total == sum(tensor.nbytes for tensor in tensors.values())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(tensors), "a tied LM head is not written twice"
    assert len(set(index.values())) == SMALL["num_hidden_layers"] + 1
    assert len({tensor.detach().float().numpy().tobytes() for tensor in tensors.values()}) == len(
        tensors
    )
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())


def test_every_side_has_the_same_memory() -> None:
    assert peers.memory_fraction(16, 100, 0.5) == pytest.approx(0.24)
    assert peers.memory_fraction(80, 100, 0.5) == 0.85
    compared = peers.sides("cuda", 4)
    assert next(iter(compared)) == peers.PLAIN, "the others are compared with it"
    assert not any("mem_fraction_static" in keywords for keywords in compared.values())


def measured(speed: float, **other: Any) -> dict[str, Any]:
    return {"tokens_per_second": speed, "kv_tokens": 1000, "mean_batch": 8.0, "fetches": 0, **other}


def test_ratios_are_of_the_same_round_and_a_side_that_fails_is_a_result() -> None:
    rounds = [
        {"plain DP": measured(100.0), "SiDP": measured(150.0), "sharded_gpu": {"error": "no"}},
        {"plain DP": measured(200.0), "SiDP": measured(240.0), "sharded_gpu": {"error": "no"}},
    ]
    compared = {name: peers.row(name, rounds) for name in rounds[0]}
    assert compared["SiDP"]["over_plain"]["min"] == 1.2
    assert compared["SiDP"]["over_plain"]["max"] == 1.5
    keywords = {name: {"dp_size": 4} for name in compared}
    heads, rows = peers.table({"sides": compared, "keywords": keywords})
    assert {len(row) for row in rows} == {len(heads)}
    assert rows[2][-1] == "failed: no"
    rounds[0]["plain DP"] = {"error": "too large"}
    assert "over_plain" not in peers.row("SiDP", rounds), "where plain DP does not fit"
