"""What calibration measures between ranks, over both transports: real fetches, rows that come back
right."""

import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sidp_sgl.planner.calibrate.command import SMALL
from sidp_sgl.planner.calibrate.device import CpuStopwatch
from sidp_sgl.planner.calibrate.layers import Decoder, Fetches, SentRows
from sidp_sgl.planner.calibrate.points import num_layers_of
from sidp_sgl.planner.models import shape_from_config
from tests.support.transports import KINDS, make_transport

RANKS, BLOCK = 2, 8192
LAYERS = num_layers_of(RANKS)


def on_ranks(run: Callable[[int], Any]) -> list[Any]:
    results: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: run(n)}), daemon=True)
        for n in range(RANKS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == RANKS, "a rank failed"
    return [results[number] for number in range(RANKS)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_fetches_what_others_own(kind: str) -> None:
    meeting, ended = uuid.uuid4().hex, threading.Barrier(RANKS)

    def run(rank: int) -> tuple[list[int], int, float]:
        fetches = Fetches(meeting, rank, RANKS, BLOCK, make_transport(kind))
        computed: list[int] = []
        watch = CpuStopwatch()
        for _ in range(3):
            fetches.run(computed.append, watch)
        num_bytes = fetches._pool.prefetcher.counters.bytes
        ended.wait(30)
        fetches.close()
        return computed, num_bytes, watch.seconds

    for computed, num_bytes, seconds in on_ranks(run):
        assert computed == 3 * list(range(LAYERS))
        assert num_bytes >= 3 * (LAYERS // 2) * BLOCK
        assert seconds > 0


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_computed_by_their_owners(kind: str) -> None:
    meeting, ended = uuid.uuid4().hex, threading.Barrier(RANKS)
    shape = shape_from_config(SMALL, "small")
    decoders = []
    for _ in range(RANKS):  # alike, so that either can say what the other computes
        torch.manual_seed(0)
        decoders.append(Decoder(shape, LAYERS, 3, torch.device("cpu")))

    def run(rank: int) -> tuple[int, int]:
        decoder, transport = decoders[rank], make_transport(kind)
        sent = SentRows(meeting, rank, RANKS, decoder, shape.hidden_size, transport)
        with torch.inference_mode():
            rows = decoder.rows
            for layer in range(LAYERS):
                result, expected = sent.run(layer, rows), decoder.ffn(layer, rows)
                torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
        ended.wait(30)
        counters = sent._endpoint.counters()
        sent.close()
        return counters["rows_sent"], counters["rows_served"]

    assert on_ranks(run) == [(3 * LAYERS // 2,) * 2] * RANKS
