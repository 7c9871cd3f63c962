"""Inside the engine's process: requests from the job, answers to it, until either ends."""

import asyncio
import logging
from typing import Any

import orjson
import psutil
import zmq
import zmq.asyncio
from fastapi import Response
from pydantic import BaseModel, ValidationError
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.utils.json_response import model_json_response

from sidp_sgl.batch.engine_process import ANSWER, FAILED, READY, REQUEST, STATUS, STOP
from sidp_sgl.batch.records import error_body
from sidp_sgl.batch.request import CHAT, COMPLETIONS
from sidp_sgl.scheduler.lifecycle.liveness import RankFailure

_WATCH_SECONDS = 0.5
_STATUS_SECONDS = 2.0
_REASON_SECONDS = 10.0  # an engine without --sidp never says why it does not answer
_BAD_REQUEST, _SERVER_ERROR = 400, 500
_ERROR_TYPES = {_BAD_REQUEST: "invalid_request_error"}


def serve(engine: Any, socket: zmq.Socket) -> None:
    """Returns when the job says stop, or when the engine has failed and the job knows."""
    engine.loop.run_until_complete(_Serving(engine, zmq.asyncio.Socket(socket)).run())


class _Serving:
    def __init__(self, engine: Any, socket: zmq.asyncio.Socket) -> None:
        self._engine = engine
        self._socket = socket
        manager, templates = engine.tokenizer_manager, engine.template_manager
        self._handlers: dict[str, tuple[type[BaseModel], Any]] = {
            CHAT: (ChatCompletionRequest, OpenAIServingChat(manager, templates)),
            COMPLETIONS: (CompletionRequest, OpenAIServingCompletion(manager, templates)),
        }
        self._processes = [psutil.Process(pid) for pid in engine.get_all_child_pids()]
        self._tasks: set[asyncio.Task] = set()
        self._failed = asyncio.Event()
        # The job is told once; SGLang would log it with every request that was waiting.
        logging.getLogger(OpenAIServingBase.__module__).addFilter(_is_no_rank_failure)

    async def run(self) -> None:
        await self._socket.send_multipart([READY, b""])
        loops = [self._read(), self._report(), self._watch()]
        running = [asyncio.ensure_future(loop) for loop in loops]
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
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
                task.add_done_callback(self._tasks.discard)

    async def _answer(self, line: int, url: str, body: bytes) -> None:
        status, content, usage = await self._handle(url, body)
        # An engine that has failed answers with a server error: that is no result.
        if status >= _SERVER_ERROR and self._has_lost_a_process():
            self._failed.set()
            return
        header = orjson.dumps([line, status, *usage])
        await self._socket.send_multipart([ANSWER, header, content])

    async def _handle(self, url: str, body: bytes) -> tuple[int, bytes, tuple[int, int]]:
        """HTTP status, JSON body, prompt and output tokens."""
        model, handler = self._handlers[url]
        try:
            request = model.model_validate_json(body)
        except ValidationError as error:
            return _BAD_REQUEST, _error(_BAD_REQUEST, _text_of(error)), (0, 0)
        response = await handler.handle_request(request, None)
        usage = getattr(response, "usage", None)
        rendered: Response = model_json_response(response)
        if rendered.status_code < _BAD_REQUEST:
            tokens = (usage.prompt_tokens, usage.completion_tokens or 0) if usage else (0, 0)
            return rendered.status_code, bytes(rendered.body), tokens
        message = orjson.loads(rendered.body)["message"]
        return rendered.status_code, _error(rendered.status_code, message), (0, 0)

    async def _watch(self) -> None:
        """Until a process of the engine has ended; tells the job why."""
        while not self._has_lost_a_process():
            try:
                await asyncio.wait_for(self._failed.wait(), _WATCH_SECONDS)
            except TimeoutError:
                continue
        content = {"reason": await self._reason(), "usage": False}
        await self._socket.send_multipart([FAILED, orjson.dumps(content)])

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
        loads = self._engine.tokenizer_manager.load_snapshot_reader
        while True:
            try:
                states = [state["sidp"] for state in await self._states() if "sidp" in state]
                iterations = [state["iterations"] for state in states]
                was, cas = (sum(steps[mode] for steps in iterations) for mode in ("was", "cas"))
                status = [was, cas, _kv_use(loads)]
                await self._socket.send_multipart([STATUS, orjson.dumps(status)])
            except RankFailure:
                self._failed.set()
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


def _error(status: int, message: str) -> bytes:
    return error_body(message, _ERROR_TYPES.get(status, "server_error"), status)


def _text_of(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()
    )
