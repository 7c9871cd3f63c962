"""Checkpoints that can't be loaded are named before anything is."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.sglang_hooks.model import headers

EXPERTS = "model.layers.3.mlp.experts"


def write(folder: Path, num_experts: int = 4) -> Path:
    tensors = {
        f"{EXPERTS}.{number}.{name}.weight": torch.randn(4, 4)
        for number in range(num_experts)
        for name in ("up_proj", "down_proj")
    }
    save_file(tensors, folder / "a.safetensors")
    save_file({"norm": torch.randn(4)}, folder / "b.safetensors")
    files = {**dict.fromkeys(tensors, "a.safetensors"), "norm": "b.safetensors"}
    (folder / headers.INDEX).write_text(json.dumps({"weight_map": files}))
    return folder


def test_a_whole_checkpoint_passes(tmp_path: Path) -> None:
    headers.check_files(write(tmp_path))
    assert headers.read_dtypes(tmp_path / "b.safetensors") == {"norm": "F32"}


@given(st.data())
def test_a_file_that_is_cut_anywhere_is_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write(tmp_path_factory.mktemp("cut")) / "a.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(SidpUsageError, match=r"a\.safetensors is (cut|no safetensors file)") as got:
        headers.check_files(path.parent)
    assert "\n" not in str(got.value) and "copy it again" in str(got.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    (write(tmp_path) / "b.safetensors").unlink()
    with pytest.raises(SidpUsageError, match=r"names b\.safetensors, which is not there"):
        headers.check_files(tmp_path)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    (write(tmp_path) / headers.INDEX).write_text("[]")
    with pytest.raises(SidpUsageError, match=r"index\.json can't be read"):
        headers.check_files(tmp_path)


@given(st.integers(2, 6), st.data())
def test_an_expert_that_lacks_a_tensor_is_named(num_experts: int, data: st.DataObject) -> None:
    dtypes = {
        f"{EXPERTS}.{number}.{name}": "BF16"
        for number in range(num_experts)
        for name in ("up.weight", "down.weight")
    }
    gone = data.draw(st.sampled_from(sorted(dtypes)[:-2]))  # the last one may be the last
    del dtypes[gone]
    with pytest.raises(SidpUsageError, match=f"has no {gone}"):
        headers.check_experts(dtypes, Path("x"))


def test_experts_in_two_dtypes_are_named() -> None:
    dtypes = {f"{EXPERTS}.0.up.weight": "BF16", f"{EXPERTS}.1.up.weight": "F8_E4M3"}
    with pytest.raises(SidpUsageError, match=r"experts\.\*\.up\.weight in BF16 and F8_E4M3"):
        headers.check_experts(dtypes, Path("x"))
