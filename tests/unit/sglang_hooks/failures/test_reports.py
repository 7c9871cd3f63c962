"""The DP controller's reports of its ranks' ends, with real processes."""

import multiprocessing
import os
import signal
import time
from typing import Any

import pytest
from sglang.srt.runtime_context import get_parallel

from sidp_sgl.scheduler.lifecycle.liveness import Exited
from sidp_sgl.scheduler.member import Member
from sidp_sgl.sglang_hooks.failures import reports
from sidp_sgl.sglang_hooks.failures.reports import ControllerReports


class Lifeline:
    def __init__(self, group: str) -> None:
        self.sent: list[Exited] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


def rank(server_args: str, tp_rank: int, dp_rank: int, pipe: str = "") -> None:
    """As SGLang's: the process of a rank, whose arguments say which."""
    if dp_rank == 1:
        os._exit(3)
    time.sleep(600)


def test_every_rank_is_watched_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "tie", Lifeline)
    controller: Any = ControllerReports("group")
    context = multiprocessing.get_context("fork")  # children that import nothing
    processes = [context.Process(target=rank, args=("arguments", 0, n)) for n in range(3)]
    with get_parallel().override(tp_size=1):
        for process in processes:
            controller.start(type(process).start, process)
    pids = [process.pid for process in processes]
    assert pids[0] is not None
    os.kill(pids[0], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while len(controller._lifeline.sent) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[2].kill()
    processes[2].join()
    sent = controller._lifeline.sent
    assert Exited(Member(0), pids[0], -signal.SIGKILL) in sent
    assert Exited(Member(1), pids[1] or 0, 3) in sent
