"""A script whose engine every process of it would start again: one line, and no traceback."""

import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest

from sidp_sgl.config import SidpConfig
from sidp_sgl.scheduler.lifecycle.liveness import ENGINE, RankFailure, Unguarded, UnguardedScript
from sidp_sgl.sglang_hooks import arguments
from sidp_sgl.sglang_hooks.failures import engine


class Ended(BaseException):
    """Stands for the end of the process."""


class FailedGuard:
    """Of an engine that has failed while it started."""

    def __init__(self, failure: RankFailure, announce: Any) -> None:
        self.engine = "fake"
        self._failure = failure
        announce(failure)

    def explanation(self) -> RankFailure:
        return self._failure

    def close(self) -> None:
        pass


def server_args() -> Any:
    made = SimpleNamespace()
    arguments.attach(made, SidpConfig(sidp=True).of_engine("fake", "auto", is_server=False))
    return made


def fails(*_: Any, **__: Any) -> None:
    raise EOFError("the DP controller has gone")


def launch(monkeypatch: pytest.MonkeyPatch, failure: RankFailure) -> None:
    monkeypatch.setattr(engine.required, "apply", lambda _: None)
    monkeypatch.setattr(engine.guards, "add", lambda _: None)
    monkeypatch.setattr(engine, "Guard", lambda _, announce: FailedGuard(failure, announce))
    engine._launch(fails, object, server_args=server_args())


def test_a_process_that_starts_up_tells_its_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []

    def end_with(*message: Any) -> None:
        said.append(message)
        raise Ended

    monkeypatch.setattr(engine, "end_with", end_with)
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    monkeypatch.setenv(ENGINE, "another")
    with pytest.raises(Ended):
        engine._launch(fails, object, server_args=server_args())
    assert said == [("another", Unguarded())]


def test_the_main_process_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        launch(monkeypatch, UnguardedScript())
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the script starts the engine outside of `if __name__ ==")


def test_other_failures_are_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankFailure, match="no memory"):
        launch(monkeypatch, RankFailure("no memory"))
