"""Which tensors of a checkpoint a rank reads: all but those of its placeholder units."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks.model.checkpoint import CheckpointReader

# What a unit is called in the checkpoint: SGLang stacks some projections, checkpoints do not.
STORED = {
    "mlp": ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"],
    "self_attn.qkv_proj": [f"self_attn.{n}_proj.{t}" for n in "qkv" for t in ("weight", "bias")],
    "self_attn.o_proj": ["self_attn.o_proj.weight"],
}
# Names that begin like a unit's and are not its.
NEIGHBOURS = ["mlp_norm.weight", "self_attn.q_norm.weight", "self_attn.q_proj_scale", "mlp2.weight"]


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, made where it is missing."""
    for name in path.split("."):
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    return root


def read(
    placeholder_units: set[str], tensors: dict[str, torch.Tensor], layers: set[int]
) -> tuple[dict[str, torch.Tensor], CheckpointReader]:
    """Go through the reader as SGLang's loader does, over two files."""
    model = nn.Module()
    placeholders = []
    for layer in layers:
        for unit in STORED:
            path = f"model.layers.{layer}.{unit}"
            module = module_at(model, path)
            if path in placeholder_units:
                placeholders.append(module)
        module_at(model, f"model.layers.{layer}.mlp.gate_up_proj")
    reader = CheckpointReader(
        lambda module: any(module is one for one in placeholders), lambda model: None
    )
    with tempfile.TemporaryDirectory() as folder:
        names = sorted(tensors)
        files = []
        for index, part in enumerate((names[::2], names[1::2])):
            files.append(str(Path(folder) / f"model-{index}.safetensors"))
            save_file({name: tensors[name] for name in part}, files[-1])
        result = reader._load_weights_only(lambda _: dict(reader._read(files)), model)
    return result, reader


@settings(max_examples=40)
@given(
    st.sets(st.sampled_from([0, 1, 2, 10, 11, 12, 21, 111]), min_size=1),
    st.sampled_from([("mlp",), tuple(STORED)]),
    st.data(),
)
def test_exactly_the_tensors_of_placeholder_units_are_skipped(
    layers: set[int], units: tuple[str, ...], data: st.DataObject
) -> None:
    foreign = data.draw(st.sets(st.sampled_from(sorted(layers))))
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    expected = set(names)
    for layer in layers:
        prefix = f"model.layers.{layer}."
        names += [
            prefix + n for n in [*NEIGHBOURS, *(n for stored in STORED.values() for n in stored)]
        ]
        expected.update(prefix + name for name in NEIGHBOURS)
        for unit, stored in STORED.items():
            if layer not in foreign or unit not in units:
                expected.update(prefix + name for name in stored)
    tensors = {
        name: torch.full((1 + index % 5,), index, dtype=torch.bfloat16)
        for index, name in enumerate(names)
    }
    placeholders = {f"model.layers.{layer}.{unit}" for layer in foreign for unit in units}
    result, reader = read(placeholders, tensors, layers)
    assert set(result) == expected
    assert all(torch.equal(result[name], tensors[name]) for name in expected)
    assert reader.bytes_read == sum(2 * tensors[name].numel() for name in expected)


def test_a_unit_at_the_root_is_skipped_too() -> None:
    model = nn.Module()
    model.mlp = nn.Module()
    reader = CheckpointReader(lambda module: module is model.mlp, lambda model: None)
    reader._load_weights_only(lambda _: None, model)
    assert reader._skipped is not None
    assert reader._skipped.match("mlp.down_proj.weight")
    assert not reader._skipped.match("mlp_norm.weight")


def test_reading_before_the_model_is_known_is_an_error() -> None:
    with pytest.raises(SidpError, match="before the model was known"):
        next(CheckpointReader(lambda _: True, lambda model: None)._read([]))
