"""The engine's process of a batch job without its ranks: SGLang's own request handling, from the
OpenAI handlers to the message for the ranks, over a stand-in for these that answers or raises.
"""

import asyncio
import os
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.parser.template_manager import TemplateManager
from sglang.srt.runtime_context import create_context, use_context
from sglang.srt.server_args import PortArgs, ServerArgs

from bench.demo_job import CHECKPOINT
from sidp_sgl.batch.engine import serving
from sidp_sgl.batch.engine_process import STOP, EngineProcess
from sidp_sgl.batch.progress import NO_STATUS

STEPS = ("handle", "convert", "dispatch", "wait", "handled")


class EngineWithoutRanks:
    """As `sgl.Engine` is to `batch.serving`.

    `on_step` is called with each of a request's STEPS, and may raise. Every request is answered
    with the text 46.
    """

    def __init__(self) -> None:
        args = ServerArgs(model_path=str(CHECKPOINT), device="cpu", log_level="error")
        self._context = use_context(create_context(args, role="tokenizer"))
        self._context.__enter__()
        self.tokenizer_manager = TokenizerManager(args, PortArgs.init_new(args))
        self.template_manager = TemplateManager()
        self.template_manager.initialize_templates(self.tokenizer_manager, str(CHECKPOINT))
        manager: Any = self.tokenizer_manager
        manager._dispatch_to_scheduler = self._dispatch
        manager._wait_one_response = self._wait
        manager.get_internal_state = self._states
        manager.auto_create_handle_loop = lambda: None
        self.on_step: Callable[[str], None] = lambda _: None
        self.loop: asyncio.AbstractEventLoop
        self._sent: dict[str, Any] = {}

    def close(self) -> None:
        self._context.__exit__(None, None, None)

    def get_all_child_pids(self) -> list[int]:
        return [os.getpid()]

    def _dispatch(self, message: Any) -> None:
        self.on_step("dispatch")
        received = pickle.loads(pickle.dumps(message))  # as through a socket
        for request in getattr(received, "batch", [received]):
            self._sent[request.rid] = request

    async def _wait(self, obj: Any, request: Any = None) -> AsyncIterator[dict[str, Any]]:
        await asyncio.sleep(0)
        self.on_step("wait")
        sent = self._sent.pop(obj.rid)
        del self.tokenizer_manager.rid_to_state[obj.rid]
        tokens = [(-0.5, 3, "a"), (-0.25, 4, "b")]
        top = [tokens[: sent.top_logprobs_num or 0]] * 2
        yield {
            "text": "46",
            "output_ids": [3, 4],
            "prompt_token_ids": list(sent.input_ids),
            "meta_info": {
                "id": obj.rid,
                "finish_reason": {"type": "length", "length": 2},
                "prompt_tokens": len(sent.input_ids),
                "completion_tokens": 2,
                "cached_tokens": 0,
                "reasoning_tokens": 0,
                "weight_version": "default",
                "input_token_logprobs": tokens,
                "output_token_logprobs": tokens,
                "input_top_logprobs": top,
                "output_top_logprobs": top,
            },
        }

    async def _states(self) -> list[dict[str, Any]]:
        return []


@contextmanager
def engine_without_ranks() -> Iterator[EngineWithoutRanks]:
    engine = EngineWithoutRanks()
    with pytest.MonkeyPatch.context() as patch:
        for handler in (OpenAIServingChat, OpenAIServingCompletion):
            _add_steps(patch, handler, engine)
        try:
            yield engine
        finally:
            engine.close()


def _add_steps(patch: pytest.MonkeyPatch, handler: Any, engine: EngineWithoutRanks) -> None:
    handle, convert = handler.handle_request, handler._convert_to_internal_request

    async def handle_in_steps(self: Any, *args: Any) -> Any:
        engine.on_step("handle")
        response = await handle(self, *args)
        engine.on_step("handled")
        return response

    def convert_in_steps(self: Any, *args: Any) -> Any:
        engine.on_step("convert")
        return convert(self, *args)

    patch.setattr(handler, "handle_request", handle_in_steps)
    patch.setattr(handler, "_convert_to_internal_request", convert_in_steps)


class ServedHere(EngineProcess):
    """The engine of a job; a thread stands for its process."""

    def __init__(self, engine: EngineWithoutRanks) -> None:
        self.is_ready = False
        self.status = NO_STATUS
        self._failure = None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.bind("inproc://job")
        self._end = self._context.socket(zmq.PAIR)
        self._end.connect("inproc://job")
        self._thread = threading.Thread(target=self._serve, args=(engine,))
        self._thread.start()
        self._process: Any = SimpleNamespace(
            poll=lambda: None if self._thread.is_alive() else 1,
            wait=lambda _: None,
            returncode=1,
        )

    def _serve(self, engine: EngineWithoutRanks) -> None:
        # A loop of its own, as a process has.
        with suppress(BaseException), asyncio.Runner() as runner:
            engine.loop = runner.get_loop()
            serving.serve(engine, self._end)

    def close(self) -> None:
        if self._thread.is_alive():
            self._socket.send_multipart([STOP])
            self._thread.join(30)
        assert not self._thread.is_alive()
        self._context.destroy(linger=0)
