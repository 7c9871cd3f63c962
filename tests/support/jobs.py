"""Batch jobs without an engine: input lines, and an engine that answers at once."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from sidp_sgl.batch.errors import EngineEnded
from sidp_sgl.batch.files.records import Answer, error_body
from sidp_sgl.batch.files.request import COMPLETIONS, Request
from sidp_sgl.batch.progress import NO_STATUS


def line(custom_id: str, prompt: str = "1+1=", **body: Any) -> dict[str, Any]:
    """One line of an input, as an object."""
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": COMPLETIONS,
        "body": {"model": "demo", "prompt": prompt, **body},
    }


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    with open(path, "wb") as file:
        for content in lines:
            file.write(orjson.dumps(content) + b"\n")
    return path


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of an output; fails where one is torn."""
    return [orjson.loads(text) for text in path.read_bytes().splitlines()]


class FakeEngine:
    """Answers up to `per_call` requests in random order; dies after `lives_for` answers.

    A prompt that begins with `bad` is answered with an error, one with `poison` ends it.
    """

    def __init__(
        self,
        seed: int = 0,
        lives_for: int | None = None,
        per_call: int = 8,
        ready: bool = True,
        keeps_sent: bool = True,
    ) -> None:
        self.is_ready = ready
        self.status = NO_STATUS
        self.sent: list[Request] = []
        self.most_waiting = 0
        self.most_bytes_waiting = 0
        self.is_closed = False
        self._waiting: list[Request] = []
        self._random = random.Random(seed)
        self._lives_for = lives_for
        self._per_call = per_call
        self._keeps_sent = keeps_sent

    def send(self, request: Request) -> None:
        if self._keeps_sent:
            self.sent.append(request)
        self._waiting.append(request)
        self.most_waiting = max(self.most_waiting, len(self._waiting))
        waiting = sum(request.num_bytes for request in self._waiting)
        self.most_bytes_waiting = max(self.most_bytes_waiting, waiting)

    def receive(self, timeout: float) -> list[Answer]:
        answers = []
        for _ in range(min(self._per_call, len(self._waiting))):
            place = self._random.randrange(len(self._waiting))
            if _prompt(self._waiting[place]).startswith("poison"):
                self._lives_for = 0
            if self._lives_for is not None:
                if not self._lives_for:
                    break
                self._lives_for -= 1
            answers.append(self.answer(self._waiting.pop(place)))
        if not answers and self._lives_for == 0:
            raise EngineEnded("DP rank 1 was killed")
        return answers

    def answer(self, request: Request) -> Answer:
        prompt = _prompt(request)
        if prompt.startswith("bad"):
            return Answer(request.line, 400, error_body("too long", "invalid_request_error", 400))
        body = orjson.dumps({"choices": [{"text": f"answer to {prompt}"}]})
        return Answer(request.line, 200, body, len(prompt), 10)

    def close(self) -> None:
        self.is_closed = True


def _prompt(request: Request) -> str:
    return orjson.loads(request.body)["prompt"]
