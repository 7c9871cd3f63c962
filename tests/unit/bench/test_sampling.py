"""bench.sampling's model: what is exchanged, and that sharing divides the work by the ranks."""

import pytest

from bench.sampling import PASSES, WAYS, modelled


@pytest.mark.parametrize("kind", PASSES)
def test_sharing_divides_what_every_rank_does(kind: str) -> None:
    row = modelled(kind, 8, 151_936, 1024, "H100")
    whole, shared = (row[way] for way in WAYS)
    assert whole["received"] == pytest.approx(272e6, rel=0.01)
    expected = 0.115e6 if kind == "greedy" else whole["received"] / 8
    assert shared["received"] == pytest.approx(expected, rel=0.01)
    assert shared["moved"] <= whole["moved"] / 8
    assert shared["logits"] < whole["logits"] / 4
    assert shared["milliseconds"] < whole["milliseconds"] / 7
