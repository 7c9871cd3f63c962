"""The guard of an engine: one failure ends everything, and everybody learns why."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

import psutil
import pytest

from sidp_sgl.errors import SidpError
from sidp_sgl.scheduler.lifecycle.guard import Guard, spawning
from sidp_sgl.scheduler.lifecycle.liveness import ENGINE, RankFailure, UnguardedScript
from sidp_sgl.scheduler.member import members

REPORT = """
import sys
from sidp_sgl.scheduler.lifecycle.liveness import Exited, Failed, Lifeline, Pooled, Unguarded
from sidp_sgl.scheduler.member import Member
for message in [{}]:
    Lifeline(sys.argv[1]).send(message)
"""


class Engine:
    """A guard with two processes of its own, and what it has announced."""

    def __init__(self) -> None:
        resource_tracker.ensure_running()  # multiprocessing's own; stays with this process
        self.children_before = psutil.Process().children()
        self.announced: list[str] = []
        self.guard = Guard(uuid.uuid4().hex, lambda failure: self.announced.append(str(failure)))
        self.processes = [self.start("the DP controller"), self.start("the detokenizer")]

    def start(self, name: str) -> BaseProcess:
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
        with spawning(self.guard.engine):
            process.start()
        self.guard.watch(process, name)
        return process

    def report(self, *messages: str) -> None:
        """From another process, as a rank would; each over a lifeline of its own."""
        script = REPORT.format(", ".join(messages))
        subprocess.run([sys.executable, "-c", script, self.guard.engine], check=True)


@pytest.fixture
def engine() -> Iterator[Engine]:
    running = Engine()
    yield running
    running.guard.close()


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_nothing_left(engine: Engine) -> None:
    """No zombie either."""
    assert psutil.Process().children(recursive=True) == engine.children_before


def test_a_killed_process_is_named_and_nothing_is_left(engine: Engine) -> None:
    pid = engine.processes[0].pid
    os.kill(pid or 0, signal.SIGKILL)
    wait_until(lambda: bool(engine.announced))
    assert engine.announced == [
        f"the DP controller (pid {pid}) was killed by SIGKILL while the engine was starting; the "
        "engine has been shut down: start it again (if memory ran out, dmesg names the process)"
    ]
    assert str(engine.guard.explanation()) == engine.announced[0]
    engine.guard.close()
    assert_nothing_left(engine)


def test_closing_is_no_failure(engine: Engine) -> None:
    engine.guard.close()
    time.sleep(1.5)  # longer than the guard waits for a better reason
    assert engine.guard.failure is None and not engine.announced
    assert_nothing_left(engine)
    with pytest.raises(SidpError, match="shut down"):
        engine.guard.raise_if_ended()


def test_a_reason_is_better_than_an_exit(engine: Engine) -> None:
    engine.report("Failed(Member(1), 'no FFN')")
    wait_until(lambda: bool(engine.announced))
    assert engine.announced == ["DP rank 1 failed while the engine was starting: no FFN"]


def test_a_script_that_starts_its_engine_again(engine: Engine) -> None:
    engine.report("Unguarded()")
    wait_until(lambda: bool(engine.announced))
    assert 'outside of `if __name__ == "__main__":`' in engine.announced[0]
    with pytest.raises(UnguardedScript) as caught:
        engine.guard.raise_if_ended()
    assert str(caught.value) == engine.announced[0]


def test_the_exit_of_a_rank_is_reported_by_its_parent(engine: Engine) -> None:
    engine.guard.is_ready = True
    engine.report("Exited(Member(1), 4711, -6)")
    wait_until(lambda: bool(engine.announced))
    assert engine.announced == [
        "DP rank 1 (pid 4711) was killed by SIGABRT while the engine was running; the engine has "
        "been shut down: start it again"
    ]


def test_a_lost_process_is_named_and_not_its_tp_ranks_that_fail_with_it(engine: Engine) -> None:
    engine.guard.is_ready = True
    engine.report(
        "Failed(Member(1, 0, 2), 'RuntimeError: Connection closed by peer')",
        "Exited(Member(1, 1, 2), 4711, -9)",
    )
    wait_until(lambda: bool(engine.announced))
    assert engine.announced == [
        "DP rank 1, TP rank 1 (pid 4711) was killed by SIGKILL while the engine was running; the "
        "engine has been shut down: start it again (if memory ran out, dmesg names the process)"
    ]


def test_a_tp_rank_that_fails_by_itself_is_named_with_its_reason(engine: Engine) -> None:
    engine.guard.is_ready = True
    engine.report("Failed(Member(1, 0, 2), 'RuntimeError: out of memory')")
    wait_until(lambda: bool(engine.announced))
    assert engine.announced == [
        "DP rank 1, TP rank 0 failed while the engine was running: RuntimeError: out of memory"
    ]


def test_ranks_may_exit_when_the_engine_drains(engine: Engine) -> None:
    engine.guard.is_draining = lambda: True
    engine.report("Exited(Member(0), 4711, 0)")
    engine.report("Exited(Member(1), 4712, 1)")
    wait_until(lambda: bool(engine.announced))
    assert engine.announced[0].startswith("DP rank 1")


def test_every_rank_must_have_a_pool(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidp_sgl.scheduler.lifecycle.guard._POOLED_SECONDS", 0.2)
    engine.report("Pooled(Member(0))")
    with pytest.raises(RankFailure, match="DP rank 1 started without SiDP's hooks"):
        engine.guard.ready(members(2, 1))


def test_every_member_of_a_rank_must_have_a_pool(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidp_sgl.scheduler.lifecycle.guard._POOLED_SECONDS", 0.2)
    engine.report("Pooled(Member(0, 0, 2))")
    with pytest.raises(RankFailure, match="DP rank 0, TP rank 1 started without SiDP's hooks"):
        engine.guard.ready(members(1, 2))


def test_ready_once_every_rank_has_its_pool(engine: Engine) -> None:
    engine.report("Pooled(Member(0))")
    engine.report("Pooled(Member(1))")
    engine.guard.ready(members(2, 1))
    assert engine.guard.is_ready and engine.guard.failure is None


def test_ctrl_c_is_for_the_main_process(engine: Engine) -> None:
    for process in engine.processes:
        os.kill(process.pid or 0, signal.SIGINT)
    time.sleep(0.5)
    assert all(process.is_alive() for process in engine.processes)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # its own signals still come


def test_two_engines_do_not_meet(engine: Engine) -> None:
    other = Engine()
    engine.guard.close()
    assert all(process.is_alive() for process in other.processes)
    assert other.guard.failure is None
    other.guard.close()
    assert_nothing_left(engine)


def test_processes_know_their_engine_and_nobody_else_does(engine: Engine) -> None:
    assert ENGINE not in os.environ
    for process in engine.processes:
        child = psutil.Process(process.pid)
        wait_until(lambda child=child: child.environ().get(ENGINE) == engine.guard.engine)


def test_what_the_processes_have_started_ends_too(engine: Engine) -> None:
    """Also what does not listen: a rank is the controller's child, and may be stopped."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=subprocess.call, args=(["sleep", "300"],))
    process.start()
    engine.guard.watch(process, "the DP controller")
    wait_until(lambda: bool(psutil.Process(process.pid).children()))
    (child,) = psutil.Process(process.pid).children()
    child.suspend()
    engine.guard.close()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert_nothing_left(engine)


def test_processes_that_are_not_the_engines_live_on(engine: Engine) -> None:
    other = subprocess.Popen(["sleep", "300"])
    try:
        engine.guard.close()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


async def _forever() -> None:
    await asyncio.Event().wait()


async def _stubborn() -> None:
    """Swallows its first cancellation, as `asyncio.wait_for` of Python 3.11 may."""
    try:
        await _forever()
    except asyncio.CancelledError:
        await _forever()


@pytest.mark.parametrize("wait", [_forever, _stubborn])
def test_whoever_waits_gets_the_failure(engine: Engine, wait: Callable) -> None:
    async def call() -> None:
        await asyncio.wait_for(engine.guard.unless_failed(wait), 30.0)

    async def calls() -> list[object]:
        engine.processes[1].kill()
        return await asyncio.gather(call(), call(), return_exceptions=True)

    results = asyncio.run(calls())
    assert [type(result) for result in results] == [RankFailure, RankFailure]
    assert "the detokenizer" in str(results[0])
    with pytest.raises(RankFailure):
        asyncio.run(engine.guard.unless_failed(_forever))  # later calls fail at once
    assert_nothing_left(engine)


def test_results_and_cancellations_pass_through(engine: Engine) -> None:
    async def answer() -> int:
        return 42

    async def check() -> None:
        assert await engine.guard.unless_failed(answer) == 42
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.guard.unless_failed(_forever), 0.05)
        async with asyncio.timeout(5):
            await engine.guard.unless_failed(answer)

    asyncio.run(check())


def test_a_converted_cancellation_leaves_the_task_as_it_was(engine: Engine) -> None:
    async def check() -> None:
        task = asyncio.current_task()
        assert task is not None
        engine.guard.fail("DP rank 0 failed", ": test")
        with pytest.raises(RankFailure):
            await engine.guard.unless_failed(_forever)
        await asyncio.sleep(0.5)  # would raise if a cancellation were still on its way
        assert task.cancelling() == 0

    asyncio.run(check())
