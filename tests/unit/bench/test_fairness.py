"""What the bench makes of first tokens that it has seen."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from bench import fairness
from bench.fairness import Answered


def seen(waits: float) -> list[Answered]:
    """A hundred requests of each class, one a second; the first ten found no queue."""
    return [
        Answered(kind, sent, 0.1 if sent < 10 else waits + sent / 1000)
        for kind in fairness.OUTPUT_TOKENS
        for sent in range(100)
    ]


def test_what_was_sent_before_the_queue_had_grown_does_not_count() -> None:
    short = fairness.percentiles(seen(2.0), after=10)["short"]
    assert short["requests"] == 90
    assert short["median"] == pytest.approx(2.0545) and short["p99"] == pytest.approx(2.098, 1e-3)


def test_the_table_says_own_over_sglang_s() -> None:
    runs = {
        method: [fairness.percentiles(seen(waits), 10) for waits in repeats]
        for method, repeats in {"round_robin": (2.0, 4.0), "sidp": (3.0, 4.0)}.items()
    }
    rows = {kind: fairness.row_of(kind, runs) for kind in fairness.OUTPUT_TOKENS}
    assert rows["short"]["p99_over_round_robin"]["min"] == pytest.approx(1.0)
    assert rows["short"]["p99_over_round_robin"]["max"] == pytest.approx(1.48, 0.01)
    clients = dict.fromkeys(fairness.OUTPUT_TOKENS, 8)
    results = {"classes": rows, "clients": clients, "output_tokens": fairness.OUTPUT_TOKENS}
    heads, (short, *_) = fairness.table(results)
    assert len(heads) == len(short)
    assert short[:3] == ["short (2)", "8", "180 / 180"] and short[-1].startswith("1.24 (1.00 to")


def test_a_request_that_waits_until_the_end_counts() -> None:
    """Else a server that lets one starve would look better for it."""

    async def load() -> list[Answered]:
        async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async with await asyncio.start_server(never_answer, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            server: Any = SimpleNamespace(url=f"http://127.0.0.1:{port}")
            return await fairness.load(server, {"short": 2, "long": 1}, 0.5, seed=0)

    found = asyncio.run(load())
    assert sorted(each.kind for each in found) == ["long", "short", "short"]
    assert all(each.sent + each.first_token >= 0.5 for each in found)
