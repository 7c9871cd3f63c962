"""How many tokens were used of late."""

from sidp_sgl.sglang_hooks.residency.recent import RecentTokens


def test_uses_are_forgotten_after_a_while() -> None:
    recent = RecentTokens(5.0)
    recent.use(0.0, 10)
    recent.use(3.0, 5)
    assert recent.total(5.0) == 15
    assert recent.total(5.1) == 5
    assert recent.total(8.1) == 0
