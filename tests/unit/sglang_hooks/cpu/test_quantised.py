"""Products over quantised weights: what codes and scales of a checkpoint say, by their formula."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.sglang_hooks.cpu import quantised
from tests.support.quantised import METHODS

IN, OUT, ROWS = 160, 200, 3  # neither is a multiple of a block


def stored(method: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A weight [OUT, IN], and its tensors in a checkpoint by the last part of their name."""
    weight = torch.randn(OUT, IN)
    tensors = {name.rpartition(".")[2]: t for name, t in METHODS[method][0]("x.weight", weight)}
    return weight, tensors


def is_near(product: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bits: int) -> bool:
    error = (product.float() - rows @ weight.T).abs().max()
    return bool(error < 30 * 2.0**-bits * (rows.norm(dim=1).max()))


def test_fp8_blocks() -> None:
    weight, tensors = stored("fp8_blocks")
    layer = SimpleNamespace(**tensors)
    method = SimpleNamespace(block_quant=True, weight_block_size=[128, 128])
    rows = torch.randn(ROWS, IN)
    assert tensors["weight_scale_inv"].shape == (2, 2)
    assert is_near(quantised._fp8_apply(None, method, layer, rows), rows, weight, 4)


@pytest.mark.parametrize("with_bias", [True, False])
def test_fp8_per_tensor_quantises_the_rows_by_the_checkpoints_scale(with_bias: bool) -> None:
    weight, tensors = stored("fp8_tensors")
    # As SGLang leaves it after loading: transposed.
    layer = SimpleNamespace(**{**tensors, "weight": tensors["weight"].t()})
    method, rows = SimpleNamespace(block_quant=False), torch.randn(ROWS, IN)
    bias = torch.randn(OUT) if with_bias else None
    product = quantised._fp8_apply(None, method, layer, rows, bias)
    assert is_near(product - (bias if bias is not None else 0), rows, weight, 3)
    step = tensors["input_scale"]
    stepped = (rows / step).to(torch.float8_e4m3fn).float() * step
    dequantised = tensors["weight"].float() * tensors["weight_scale"]
    exact = stepped @ dequantised.T + (bias if bias is not None else 0)
    assert torch.allclose(product, exact, atol=1e-4)


def test_fp8_per_channel() -> None:
    weight, tensors = stored("compressed_fp8")
    layer = SimpleNamespace(**{**tensors, "weight": tensors["weight"].t(), "input_scale": None})
    rows = torch.randn(ROWS, IN)
    scheme = SimpleNamespace(weight_block_size=None)
    assert is_near(quantised._compressed_fp8_apply(None, scheme, layer, rows), rows, weight, 4)


def test_int8_has_a_scale_per_row_and_per_channel() -> None:
    weight, tensors = stored("w8a8_int8")
    layer = SimpleNamespace(**{**tensors, "weight": tensors["weight"].t()})
    rows = torch.randn(ROWS, IN).bfloat16()
    product = quantised._int8_apply(None, None, layer, rows)
    assert product.dtype == torch.bfloat16
    assert is_near(product, rows.float(), weight, 6)


def test_awq() -> None:
    weight, tensors = stored("awq")
    found = quantised._awq_dequantise(
        None, tensors["qweight"], tensors["scales"].float(), tensors["qzeros"]
    )
    assert found.shape == (IN, OUT)
    steps = tensors["scales"].float().repeat_interleave(32, 0)
    # A zero point is rounded, too.
    assert bool(((found - weight.T).abs() <= 1.01 * steps + 1e-3).all())


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_scale_per_block_is_spread_over_it(rows: int, columns: int) -> None:
    scale = torch.rand(-(-rows // 128), -(-columns // 128))
    spread = quantised._spread(scale, [128, 128], torch.Size([rows, columns]))
    assert spread.shape == (rows, columns)
    assert spread[rows - 1, columns - 1] == scale[(rows - 1) // 128, (columns - 1) // 128]
    assert spread[0, 0] == scale[0, 0]


def test_experts_are_dequantised_one_by_one() -> None:
    block = [128, 128]
    w13, w2 = torch.randn(2, 256, 128), torch.randn(2, 128, 128)
    codes: dict[str, Any] = {}
    for name, weight in (("w13", w13), ("w2", w2)):
        scale = torch.stack(
            [torch.full((weight.shape[1] // 128, 1), 0.01 * (n + 1)) for n in (0, 1)]
        )
        codes[f"{name}_weight_scale_inv"] = scale
        spread = quantised._spread(scale, block, weight.shape)
        codes[f"{name}_weight"] = (weight / spread).to(torch.float8_e4m3fn)
    config = SimpleNamespace(
        activation="silu", apply_router_weight_on_input=False, gemm1_alpha=None,
        gemm1_clamp_limit=None,
    )  # fmt: skip
    layer = SimpleNamespace(num_experts=2, moe_runner_config=config, **codes)
    rows, ids = torch.randn(ROWS, 128), torch.tensor([[0], [1], [0]])
    dispatched = SimpleNamespace(
        hidden_states=rows, topk_output=(torch.ones(ROWS, 1), ids, torch.empty(0))
    )
    method = SimpleNamespace(quant_config=SimpleNamespace(weight_block_size=block))
    result = quantised._fp8_moe_apply(None, method, layer, dispatched).hidden_states
    for row, (expert,) in enumerate(ids.tolist()):
        gate, up = (w13[expert] @ rows[row]).chunk(2)
        expected = w2[expert] @ (torch.nn.functional.silu(gate) * up)
        assert torch.allclose(result[row], expected, rtol=0.2, atol=0.1 * expected.abs().max())
