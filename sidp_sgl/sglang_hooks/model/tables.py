"""`--sidp-pool all`: embedding and LM head, cut by rows into pieces that every slot takes.

Rows of the embedding are read out of their owners' memory, which is mapped. Pieces of the head are
blocks at the end of the step, fetched or called like any other. Tied tables are one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from sglang.srt.plugins.hook_registry import HookType
from torch import nn

from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowType

_ROWS = 64  # a piece has a multiple of so many


class Piece(nn.Module):
    """Rows `first` to `first` + `num_rows` of a table, `weight` [num_rows, width]; of the head,
    rows of `width` → logits [n, num_rows]."""

    def __init__(self, table: nn.Parameter, first: int, num_rows: int, processor: Any) -> None:
        super().__init__()
        self.first, self.num_rows = first, num_rows
        self.__dict__["_processor"] = processor  # not a submodule
        memory = torch.empty(num_rows, table.shape[1], dtype=table.dtype, device=table.device)
        self.weight = nn.Parameter(memory, requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._processor._compute_lm_head(rows, self)

    @property
    def logits_dtype(self) -> torch.dtype:
        processor = self._processor
        is_cuda = self.weight.is_cuda
        as_float = processor.use_fp32_lm_head or (is_cuda and processor.use_fp32_lm_head_output)
        return torch.float32 if as_float else self.weight.dtype


def pooled_piece(piece: Piece, number: int, block: int, *, is_last: bool) -> PooledUnit:
    """A piece of the head as the weight pool sees it."""
    return PooledUnit(
        number,
        block,
        is_last,
        payload=(RowType(piece.weight.shape[1], piece.weight.dtype),),
        result=RowType(piece.num_rows, piece.logits_dtype),
        forward=piece.forward,
        partial=piece.forward,
    )


@dataclass(frozen=True)
class Table:
    """`modules` hold it, two where head and embedding share it. `is_head`: its pieces are fetched;
    else they are only read where they lie."""

    modules: list[VocabParallelEmbedding]
    pieces: list[Piece]
    is_head: bool

    def load_into(self, own: list[Piece]) -> None:
        """Let SGLang load the table into the pieces of this rank, and hold no other memory."""
        weight = self.modules[0].weight
        attributes, device, original = dict(weight.__dict__), weight.device, weight.weight_loader

        def load(_: torch.Tensor, loaded: torch.Tensor) -> None:
            whole = nn.Parameter(torch.empty_like(meta, device=device), requires_grad=False)
            whole.__dict__.update(attributes)
            original(whole, loaded)  # this TP rank's shard, padded
            for piece in own:
                piece.weight.data.copy_(whole[piece.first : piece.first + piece.num_rows])

        meta = nn.Parameter(weight.to("meta"), requires_grad=False)
        meta.__dict__.update({**attributes, "weight_loader": load})
        for module in self.modules:
            module.weight = meta

    def gather_from(self, views: list[torch.Tensor]) -> None:
        """Let the embedding read its rows from `views` of the pieces."""
        self.modules[0].quant_method = GatheredEmbedding(views)


def find_tables(model: nn.Module, largest_block: int) -> list[Table]:
    """Embedding and head of `model`, once where they are tied, in pieces of `largest_block` bytes
    at most. Raises SidpError."""
    embeddings, heads, processors = (
        [module for module in model.modules() if isinstance(module, kind)]
        for kind in (VocabParallelEmbedding, ParallelLMHead, LogitsProcessor)
    )
    embeddings = [module for module in embeddings if module not in heads]
    if len(embeddings) != 1 or len(heads) > 1 or len(processors) != 1:
        raise SidpError(
            f"--sidp-pool all: the model has {len(embeddings)} embeddings and {len(heads)} LM "
            "heads where one each is expected: use --sidp-pool linear"
        )
    embedding, head = embeddings[0], heads[0] if heads else None
    for module in (*embeddings, *heads):
        if not isinstance(module.quant_method, UnquantizedEmbeddingMethod) or (
            getattr(module, "bias", None) is not None
        ):
            raise SidpError(
                f"--sidp-pool all: {type(module).__name__} is quantised or has a bias, which can't "
                "be pooled: use --sidp-pool linear"
            )

    def table(modules: list[VocabParallelEmbedding], is_head: bool) -> Table:
        return Table(modules, _pieces(modules[0].weight, largest_block, processors[0]), is_head)

    if head is None or head.weight is embedding.weight:
        return [table([*embeddings, *heads], True)]
    return [table(embeddings, False), table(heads, True)]


def _pieces(table: nn.Parameter, largest_block: int, processor: Any) -> list[Piece]:
    num_rows, row_bytes = table.shape[0], table.shape[1] * table.element_size()
    most = max(_ROWS, largest_block // row_bytes // _ROWS * _ROWS)
    return [
        Piece(table, first, min(most, num_rows - first), processor)
        for first in range(0, num_rows, most)
    ]


class GatheredEmbedding:
    """SGLang's embedding method over pieces that lie at their owners: `views` [rows, width] in the
    order of the table's rows."""

    def __init__(self, views: list[torch.Tensor]) -> None:
        self._views = views

    def embedding(self, layer: nn.Module, input_: torch.Tensor) -> torch.Tensor:
        first, result = 0, None
        for view in self._views:
            found = F.embedding((input_ - first).clamp(0, len(view) - 1), view)
            if result is None:
                result = found
            else:
                result = torch.where((input_ >= first).unsqueeze(-1), found, result)
            first += len(view)
        assert result is not None
        return result


def head_hook(table: Table) -> Hook:
    """Logits of the table's pieces, side by side."""

    def compute(
        original: Callable, processor: Any, rows: torch.Tensor, head: Any, *rest: Any, **named: Any
    ) -> torch.Tensor:
        if isinstance(head, Piece):
            return original(processor, rows, head)
        parts = [piece(rows) for piece in table.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    target = "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head"
    return Hook(target, compute, HookType.AROUND)
