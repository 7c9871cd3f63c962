"""Inside the engine's process: requests from the job, answers to it, until either ends."""

import asyncio
import contextlib
import logging
import time
from typing import Any

import orjson
import psutil
import zmq
import zmq.asyncio
from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase

from sidp_sgl.batch.engine.handlers import SERVER_ERROR, Handlers
from sidp_sgl.batch.engine_process import ANSWER, FAILED, READY, REQUEST, STATUS, STOP
from sidp_sgl.scheduler.lifecycle.liveness import RankFailure, one_line

_WATCH_SECONDS = 0.5
_STATUS_SECONDS = 2.0
_REASON_SECONDS = 10.0  # an engine without --sidp never says why it does not answer
_FAILING_SECONDS = 1.0
_LOST_SECONDS = 600.0  # with requests and nothing to do; tokenizing a long prompt takes a minute


def serve(engine: Any, socket: zmq.Socket) -> None:
    """Returns when the job says stop, or when the engine has failed and the job knows."""
    engine.loop.run_until_complete(_Serving(engine, zmq.asyncio.Socket(socket)).run())


class _Serving:
    def __init__(self, engine: Any, socket: zmq.asyncio.Socket) -> None:
        self._engine = engine
        self._socket = socket
        self._handlers = Handlers(engine.tokenizer_manager, engine.template_manager)
        self._processes = [psutil.Process(pid) for pid in engine.get_all_child_pids()]
        self._tasks: set[asyncio.Task] = set()
        self._loads = engine.tokenizer_manager.load_snapshot_reader
        self._busy_at = time.monotonic()
        self._failure = asyncio.Event()
        self._reason_given: str | None = None
        self._is_over = False
        # The job is told once; SGLang would log it with every request that was waiting.
        logging.getLogger(OpenAIServingBase.__module__).addFilter(_is_no_rank_failure)

    async def run(self) -> None:
        await self._socket.send_multipart([READY, b""])
        loops = [self._read(), self._report(), self._watch()]
        running = [asyncio.ensure_future(loop) for loop in loops]
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        self._is_over = True
        for task in [*running, *self._tasks]:
            task.cancel()
        results = await asyncio.gather(*running, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _read(self) -> None:
        while True:
            kind, *message = await self._socket.recv_multipart()
            if kind == STOP:
                return
            if kind == REQUEST:
                line, url = orjson.loads(message[0])
                task = asyncio.ensure_future(self._answer(line, url, message[1]))
                self._tasks.add(task)
                task.add_done_callback(self._end)

    async def _answer(self, line: int, url: str, body: bytes) -> None:
        result = await self._handlers.answer(url, body)
        if result.status >= SERVER_ERROR and await self._is_failing():
            return  # what a failing engine answers is no result
        header = orjson.dumps([line, result.status, *result[2:]])
        await self._socket.send_multipart([ANSWER, header, result.body])
        self._busy_at = time.monotonic()

    def _end(self, task: asyncio.Task) -> None:
        """Nothing leaves a request unanswered: where no answer was sent, the engine has failed."""
        self._tasks.discard(task)
        if task.cancelled():
            if not self._is_over:
                self._fail("a request was cancelled in the engine's process")
        elif (error := task.exception()) is not None:
            self._fail(f"an answer was not sent: {one_line(error)}")

    async def _is_failing(self) -> bool:
        """A failing engine answers before its processes have ended."""
        if not self._has_lost_a_process():
            await asyncio.sleep(_FAILING_SECONDS)
        return self._failure.is_set() or self._has_lost_a_process()

    def _fail(self, reason: str) -> None:
        self._reason_given = self._reason_given or reason
        self._failure.set()

    async def _watch(self) -> None:
        """Until the engine has failed; tells the job why."""
        while not (self._failure.is_set() or self._has_lost_a_process()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._failure.wait(), _WATCH_SECONDS)
            self._look_for_lost_requests()
        content = {"reason": self._reason_given or await self._reason(), "usage": False}
        await self._socket.send_multipart([FAILED, orjson.dumps(content)])

    def _look_for_lost_requests(self) -> None:
        now, loads = time.monotonic(), self._loads.read_all()
        is_known = bool(loads) and all(load.timestamp for load in loads)
        has_work = any(load.num_running_reqs or load.num_waiting_reqs for load in loads)
        if has_work or not (self._tasks and is_known):
            self._busy_at = now
        if now - self._busy_at > _LOST_SECONDS:
            self._fail(f"{len(self._tasks)} requests got no answer, and no rank has them")

    def _has_lost_a_process(self) -> bool:
        return any(not _is_alive(process) for process in self._processes)

    async def _reason(self) -> str:
        lost = next(process.pid for process in self._processes if not _is_alive(process))
        try:
            await asyncio.wait_for(self._states(), _REASON_SECONDS)
        except RankFailure as failure:
            return str(failure)
        except Exception:
            pass
        return f"process {lost} of the engine has ended"

    async def _states(self) -> list[dict[str, Any]]:
        return await self._engine.tokenizer_manager.get_internal_state()

    async def _report(self) -> None:
        """Mode mix and KV use, for the progress bar."""
        while True:
            try:
                states = [state["sidp"] for state in await self._states() if "sidp" in state]
                iterations = [state["iterations"] for state in states]
                modes = iterations[0] if iterations else ()
                total = {mode: sum(steps[mode] for steps in iterations) for mode in modes}
                status = [total, _kv_use(self._loads)]
                await self._socket.send_multipart([STATUS, orjson.dumps(status)])
            except RankFailure as failure:
                self._fail(str(failure))
            await asyncio.sleep(_STATUS_SECONDS)


def _kv_use(reader: Any) -> float | None:
    """Share of the KV tokens in use by requests; None where SGLang publishes no loads."""
    loads = reader.read_all()
    total = sum(load.max_total_num_tokens for load in loads)
    return sum(load.num_used_tokens for load in loads) / total if total else None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_no_rank_failure(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], RankFailure))
