"""A stream that is held to a timetable goes on in time, never earlier."""

import time

import torch

from sidp_sgl.kernels import pacing


def test_a_wait_for_a_timetable_ends(device: torch.device) -> None:
    clock = torch.zeros(1, dtype=torch.int64, device=device)
    for mark, wait in (
        (pacing.mark, pacing.wait_until),
        (pacing.mark_reference, pacing.wait_until_reference),
    ):
        started = time.monotonic()
        mark(clock)
        wait(clock, 0.02)
        wait(clock, 0.01)  # behind its time already
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
        # The interpreter has no clock.
        assert seconds >= 0.019 or (device.type == "cpu" and mark is pacing.mark)
