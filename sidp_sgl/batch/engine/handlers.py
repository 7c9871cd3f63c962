"""From a request's body to the response of SGLang's own OpenAI handlers, whatever these do.

A request goes through the same code as on SGLang's server, so that chat templates, sampling
parameters, tools and log probabilities mean the same.
"""

import asyncio
import traceback
from typing import Any, NamedTuple

import orjson
from fastapi import Response
from pydantic import BaseModel, ValidationError
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.utils.json_response import model_json_response

from sidp_sgl.batch.engine.bounds import out_of_bounds
from sidp_sgl.batch.files.records import error_body
from sidp_sgl.batch.files.request import CHAT, COMPLETIONS

BAD_REQUEST, SERVER_ERROR = 400, 500
_ERROR_TYPES = {BAD_REQUEST: "invalid_request_error"}


class Result(NamedTuple):
    """What a request is answered with."""

    status: int  # of HTTP
    body: bytes  # JSON
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Handlers:
    def __init__(self, tokenizer_manager: Any, template_manager: Any) -> None:
        self._vocab_size: int = tokenizer_manager.model_config.vocab_size
        self._by_url: dict[str, tuple[type[BaseModel], Any]] = {
            CHAT: (ChatCompletionRequest, OpenAIServingChat(tokenizer_manager, template_manager)),
            COMPLETIONS: (
                CompletionRequest,
                OpenAIServingCompletion(tokenizer_manager, template_manager),
            ),
        }

    async def answer(self, url: str, body: bytes) -> Result:
        """Raises only what ends the task that runs it, or the process."""
        try:
            return await self._answer(url, body)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return _error(SERVER_ERROR, "the request was cancelled in the engine")
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a panic in the tokenizer's Rust code is no Exception
            return _error(SERVER_ERROR, _describe(error))

    async def _answer(self, url: str, body: bytes) -> Result:
        model, handler = self._by_url[url]
        try:
            request = model.model_validate_json(body)
        except ValidationError as error:
            return _error(BAD_REQUEST, _text_of(error))
        except Exception as error:  # validators that take the body for what it should be
            return _error(BAD_REQUEST, f"the body can't be understood: {_describe(error)}")
        if reason := out_of_bounds(request, self._vocab_size):
            return _error(BAD_REQUEST, reason)
        response = await handler.handle_request(request, None)
        usage = getattr(response, "usage", None)
        rendered: Response = model_json_response(response)
        if rendered.status_code < BAD_REQUEST:
            tokens = (usage.prompt_tokens, usage.completion_tokens or 0) if usage else (0, 0)
            return Result(rendered.status_code, bytes(rendered.body), *tokens)
        message = orjson.loads(rendered.body)["message"]
        return _error(rendered.status_code, message)


def _error(status: int, message: str) -> Result:
    return Result(status, error_body(message, _ERROR_TYPES.get(status, "server_error"), status))


def _describe(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def _text_of(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()
    )
