"""Tables in pieces: cut by rows, loaded by SGLang's own loader, gathered and multiplied as one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from torch import nn

from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks.model.tables import (
    GatheredEmbedding,
    Piece,
    find_tables,
    head_hook,
)

VOCAB, WIDTH = 200, 8
ROW_BYTES = 4 * WIDTH


class Embedding(VocabParallelEmbedding):
    """SGLang's class without the set-up of a distributed engine."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.quant_method = UnquantizedEmbeddingMethod()
        self.weight = nn.Parameter(torch.randn(VOCAB, WIDTH), requires_grad=False)
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: Any, loaded: torch.Tensor) -> None:
        assert parameter.weight_loader
        parameter.data[: len(loaded)] = loaded
        parameter.data[len(loaded) :] = 0


class Head(ParallelLMHead):
    __init__ = Embedding.__init__  # type: ignore[assignment]
    load = Embedding.load


class Processor(LogitsProcessor):
    def __init__(self, as_float: bool = False) -> None:
        nn.Module.__init__(self)
        self.use_fp32_lm_head = as_float

    def _compute_lm_head(self, rows: torch.Tensor, head: Any) -> torch.Tensor:  # type: ignore[override]
        return rows @ head.weight.T


def model(*tables: nn.Module) -> nn.Module:
    return nn.ModuleList([*tables, Processor()])


def test_untied_tables_are_two_and_only_the_head_is_fetched() -> None:
    tables = find_tables(model(Embedding(), Head()), 64 * ROW_BYTES)
    assert [table.is_head for table in tables] == [False, True]
    for table in tables:
        assert [(piece.first, piece.num_rows) for piece in table.pieces] == [
            (0, 64), (64, 64), (128, 64), (192, 8),
        ]  # fmt: skip


@pytest.mark.parametrize("shares_the_parameter", [True, False])
def test_tied_tables_are_one(shares_the_parameter: bool) -> None:
    embedding, modules = Embedding(), [Embedding()]
    if shares_the_parameter:
        head = Head()
        head.weight = embedding.weight
        modules = [embedding, head]
    (table,) = find_tables(model(*modules), 10**9)
    assert table.is_head and len(table.pieces) == 1
    table.load_into([])
    assert all(module.weight.is_meta for module in modules)


@given(st.integers(1, 3 * VOCAB * ROW_BYTES))
def test_pieces_cover_the_table_and_fit(largest_block: int) -> None:
    (table,) = find_tables(model(Embedding()), largest_block)
    end = 0
    for piece in table.pieces:
        assert piece.first == end
        end += piece.num_rows
        assert piece.num_rows * ROW_BYTES <= max(largest_block, 64 * ROW_BYTES)
    assert end == VOCAB


def test_own_pieces_are_loaded_by_sglangs_loader_and_nothing_else_is_kept() -> None:
    module = Embedding()
    (table,) = find_tables(model(module), 64 * ROW_BYTES)
    own = [table.pieces[1], table.pieces[3]]
    table.load_into(own)
    assert module.weight.is_meta
    loaded = torch.randn(VOCAB - 4, WIDTH)  # the rest is padding
    module.weight.weight_loader(module.weight, loaded)  # type: ignore[operator]
    assert torch.equal(own[0].weight, loaded[64:128])
    assert torch.equal(own[1].weight, torch.cat([loaded[192:], torch.zeros(4, WIDTH)]))


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1), st.sampled_from([64, 128, 200]))
def test_rows_gathered_from_pieces_are_those_of_the_table(ids: list[int], rows: int) -> None:
    table, wanted = torch.randn(VOCAB, WIDTH), torch.tensor(ids)
    gathered = GatheredEmbedding(list(table.split(rows))).embedding(nn.Module(), wanted)
    assert torch.equal(gathered, F.embedding(wanted, table))


def test_logits_of_the_pieces_lie_side_by_side() -> None:
    head, rows = Head(), torch.randn(3, WIDTH)
    (_, table) = find_tables(model(Embedding(), head), 64 * ROW_BYTES)
    for piece in table.pieces:
        piece.weight.data.copy_(head.weight[piece.first : piece.first + piece.num_rows])
    compute: Any = head_hook(table).function
    logits = compute(Processor._compute_lm_head, Processor(), rows, head, None, out=None)
    assert torch.allclose(logits, rows @ head.weight.T, atol=1e-5)
    one = compute(Processor._compute_lm_head, Processor(), rows, table.pieces[0])
    assert torch.equal(one, rows @ table.pieces[0].weight.T)


@pytest.mark.parametrize(("as_float", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_logits_have_the_processors_dtype(as_float: bool, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(4, 4).bfloat16(), requires_grad=False)
    assert Piece(weight, 0, 4, Processor(as_float)).logits_dtype == dtype


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ([], "0 embeddings and 0 LM heads"),
        ([Embedding(), Embedding()], "2 embeddings and 0 LM heads"),
        ([Embedding(), Head(), Head()], "1 embeddings and 2 LM heads"),
    ],
)
def test_other_models_are_refused(tables: list[nn.Module], reason: str) -> None:
    with pytest.raises(SidpError, match=f"{reason} where one each.*use --sidp-pool linear"):
        find_tables(model(*tables), 10**9)


@pytest.mark.parametrize("change", [{"quant_method": SimpleNamespace()}, {"bias": torch.zeros(1)}])
def test_a_table_that_is_no_plain_matrix_is_refused(change: dict[str, Any]) -> None:
    head = Head()
    vars(head).update(change)
    with pytest.raises(SidpError, match="Head is quantised or has a bias"):
        find_tables(model(Embedding(), head), 10**9)
