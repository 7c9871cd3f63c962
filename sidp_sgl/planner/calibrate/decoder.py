"""A decoder layer of plain operators, alike in shape to SGLang's: what copies and calls run beside.

Room: calibration. Its own time is not what a step of SGLang takes: that is measured in SGLang.
"""

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from sidp_sgl.planner.models import ModelShape
from sidp_sgl.planner.weights import Split, layer_weights

CONTEXT_TOKENS = 128  # of a request, as in the engine's own measuring
_MOST_BYTES = 1 << 28  # of weights; layers beyond use those of the first ones again


class Decoder:
    """`batch` requests on `device`, all in BF16."""

    def __init__(self, shape: ModelShape, num_layers: int, batch: int, device: torch.device):
        weights = layer_weights(shape, 0, Split())
        gemms = (weights.qkv, weights.o, weights.gate_up, weights.down)
        num_bytes = sum(gemm.num_bytes("bf16") for gemm in gemms)
        distinct = min(num_layers, max(1, _MOST_BYTES // num_bytes))

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, dtype=torch.bfloat16, device=device) * 0.02

        self._layers = [
            [random(gemm.out_width, gemm.in_width) for gemm in gemms] for _ in range(distinct)
        ]
        self._norm = torch.ones(shape.hidden_size, dtype=torch.bfloat16, device=device)
        self._heads, self._kv_heads, self._width = (
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
        )
        self._keys = random(batch * CONTEXT_TOKENS, shape.num_kv_heads, shape.head_dim)
        self._tokens = torch.randperm(len(self._keys), device=device).view(batch, CONTEXT_TOKENS)
        self.rows = random(batch, shape.hidden_size)

    def attend(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """[batch, hidden_size] → the same; norms and projections included."""
        qkv, o, _, _ = self._layers[layer % len(self._layers)]
        projected = linear(rms_norm(rows, self._norm.shape, self._norm), qkv)
        queries = projected[:, : self._heads * self._width].view(-1, self._heads, 1, self._width)
        if rows.device.type == "cpu":  # as SGLang's torch_native backend: one after another
            parts = [self._one(queries[n : n + 1], self._tokens[n]) for n in range(len(rows))]
            attended = torch.cat(parts)
        else:
            attended = self._one(queries, self._tokens)
        rows = rows + linear(attended.reshape(len(rows), -1), o)
        return rms_norm(rows, self._norm.shape, self._norm)

    def _one(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        keys = self._keys[tokens].view(len(queries), -1, self._kv_heads, self._width)
        keys = keys.transpose(1, 2)
        return scaled_dot_product_attention(queries, keys, keys, enable_gqa=True)

    def ffn(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] → the same."""
        _, _, gate_up, down = self._layers[layer % len(self._layers)]
        gate, value = linear(rows, gate_up).chunk(2, dim=-1)
        return linear(silu(gate) * value, down)
