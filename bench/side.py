"""One side of a comparison: an engine in a process of its own, so that both sides are up at once
and repeats alternate between them. An idle engine's ranks sleep."""

import contextlib
import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from sglang.srt.managers.io_struct import SetInternalStateReq

from bench.offline import JobResult, run_job, shut_down, start_engine


class Side:
    """`environment` and `keywords` as for sgl.Engine; use as a context manager. An engine that has
    not started within `start_seconds` is ended."""

    def __init__(
        self,
        name: str,
        environment: dict[str, str],
        keywords: dict[str, Any],
        start_seconds: float = 900.0,
    ) -> None:
        self.name = name
        self._start_seconds = start_seconds
        self.dp_size = keywords["dp_size"]
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, environment, keywords))
        self._process.start()
        child.close()

    def __enter__(self) -> "Side":
        if not self._pipe.poll(self._start_seconds):
            self._process.kill()
            raise RuntimeError(f"{self.name}: not started within {self._start_seconds:.0f} s")
        self._answer()  # started
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(60)

    def run(self, prompts: Sequence[Any], sampling: Any, **options: Any) -> JobResult:
        """`run_job` with these options, after emptying the prefix cache."""
        self._pipe.send(("run", prompts, sampling, options))
        return self._answer()

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


def _serve(pipe: Connection, environment: dict[str, str], keywords: dict[str, Any]) -> None:
    os.environ.update(environment)
    engine = start_engine(**keywords)
    try:
        pipe.send("started")
        while (request := pipe.recv()) is not None:
            try:
                if request[0] == "run":
                    engine.flush_cache()
                    _, prompts, sampling, options = request
                    pipe.send(run_job(engine, keywords["dp_size"], prompts, sampling, **options))
                elif request[0] == "update":
                    values = SetInternalStateReq(server_args=request[1])
                    answers = engine.tokenizer_manager.set_internal_state(values)
                    pipe.send(engine.loop.run_until_complete(answers))
                else:
                    pipe.send(engine.get_server_info()["internal_states"])
            except Exception as error:
                pipe.send(RuntimeError(str(error)))
    except EOFError:
        pass
    finally:
        shut_down(engine)
