"""One side of a comparison: an engine in a process of its own, so that both sides are up at once
and repeats alternate between them. An idle engine's ranks sleep."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from bench import offline
from bench.offline import JobResult

ROOT = Path(__file__).parents[1]
STOP_SECONDS = 60.0
T = TypeVar("T")


def rotated(sides: list[T], by: int) -> list[T]:
    """Every repeat begins with another side."""
    by %= len(sides)
    return sides[by:] + sides[:by]


class Side:
    """`environment` and `keywords` as for sgl.Engine; use as a context manager. An engine that has
    not started within `start_seconds` is ended. `tree`: the checkout whose `sidp_sgl` it runs.

    The engine's process is in a session of its own, which neither a terminal's Ctrl-C nor a signal
    to this process's group reaches: it ends, and leaves nothing, when this process does.
    """

    def __init__(
        self,
        name: str,
        environment: dict[str, str],
        keywords: dict[str, Any],
        start_seconds: float = 900.0,
        tree: Path = ROOT,
    ) -> None:
        self.name = name
        self.dp_size = keywords["dp_size"]
        self._start_seconds = start_seconds
        self._tree = tree
        near, far = socket.socketpair()
        path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", offline.__file__, str(far.fileno())],  # -P: `path` alone counts
            env={**os.environ, **environment, "PYTHONPATH": path},
            pass_fds=[far.fileno()],
            start_new_session=True,
        )
        far.close()
        self._pipe = Connection(near.detach())
        self._pipe.send(keywords)

    def __enter__(self) -> "Side":
        try:
            if not self._pipe.poll(self._start_seconds):
                raise RuntimeError(f"{self.name}: not started within {self._start_seconds:.0f} s")
            package = self._answer()
            if not Path(package).is_relative_to(self._tree):
                raise RuntimeError(f"{self.name}: runs {package}, which is not of {self._tree}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._process.poll() is None:
            self._pipe.send(None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        self._end()

    def _end(self) -> None:
        """However far it is."""
        self._pipe.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def run(self, prompts: Sequence[Any], sampling: Any, **options: Any) -> JobResult:
        """`run_job` with these options, after emptying the prefix cache."""
        self._pipe.send(("run", prompts, sampling, options))
        return JobResult(**self._answer())

    def states(self) -> list[dict[str, Any]]:
        """By rank. SGLang tells them as they arrive, and plain ranks don't say which they are:
        those come in an order that is the same at every call."""
        self._pipe.send(("states",))
        return sorted(self._answer(), key=_place)

    def update(self, **server_args: float) -> None:
        """As SGLang's `set_internal_state`, on every rank."""
        self._pipe.send(("update", server_args))
        if not all(self._answer()):
            raise RuntimeError(f"{self.name}: a rank refused {server_args}")

    def _answer(self) -> Any:
        try:
            result = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}: the engine's process has ended") from None
        if isinstance(result, Exception):
            raise result
        return result


def _place(state: dict[str, Any]) -> Any:
    """`startup_time` is a dictionary of measured times: no two ranks have the same."""
    return state["sidp"]["dp_rank"] if "sidp" in state else repr(state["startup_time"])
