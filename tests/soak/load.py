"""Random load on an engine: bursts, single requests, pauses, different lengths, aborts."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any, NamedTuple

import sglang

from examples.demo_model.arithmetic import few_shot_header, held_out_problems

ANSWER_SECONDS = 180.0  # a request without an answer after that time is lost
MOST_OPEN = 150  # requests that may be open at once
LENGTHS = (4, 20, 96)


class Request(NamedTuple):
    prompt: str
    max_new_tokens: int


def make_requests(count: int, seed: int) -> list[Request]:
    """Different ones, half of them behind a shared header."""
    random_ = random.Random(seed)
    header = few_shot_header(num_tokens_min=100)
    return [
        Request(random_.choice([header, ""]) + problem, random_.choice(LENGTHS))
        for problem, _ in held_out_problems(count, seed)
    ]


async def ask(engine: sglang.Engine, request: Request, **options: Any) -> str:
    sampling = {"temperature": 0, "max_new_tokens": request.max_new_tokens}
    return (await engine.async_generate(request.prompt, sampling, **options))["text"]


async def texts_of(engine: sglang.Engine, requests: list[Request]) -> list[str]:
    """All at once; nothing disturbs."""
    return await asyncio.gather(*(ask(engine, request) for request in requests))


class Load:
    """Sends random ones of `requests` and compares what comes with `texts`."""

    def __init__(
        self, engine: sglang.Engine, requests: list[Request], texts: list[str], seed: int
    ) -> None:
        self.sent: Counter[str] = Counter()  # by kind
        self.answered = 0
        self.problems: list[str] = []
        self.slowest_seconds = 0.0
        self._engine = engine
        self._pool = list(zip(requests, texts, strict=True))
        self._random = random.Random(seed)
        self._open: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float) -> None:
        """Until all requests that were sent within `seconds` have been answered, or are lost."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.problems:
            for pause in self._episode():
                if time.monotonic() >= end:
                    break
                self._send()
                await asyncio.sleep(pause)
                while len(self._open) >= MOST_OPEN:
                    await asyncio.wait(self._open, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(self._random.choice([0.0, 0.2, self._random.uniform(1.0, 3.0)]))
        if self._open:
            await asyncio.wait(self._open)

    def _episode(self) -> Iterator[float]:
        """A pause in seconds after each of its requests."""
        kind = self._random.choice(["burst", "trickle", "one at a time"])
        if kind == "burst":
            yield from [0.0] * self._random.randint(8, 60)
        elif kind == "trickle":
            rate = self._random.choice([5.0, 20.0, 60.0])  # per second
            for _ in range(self._random.randint(10, 60)):
                yield self._random.expovariate(rate)
        else:
            yield from [self._random.uniform(0.3, 1.0)] * self._random.randint(1, 5)

    def _send(self) -> None:
        number = sum(self.sent.values())
        is_aborted = self._random.random() < 0.1
        self.sent["aborted" if is_aborted else "answered"] += 1
        request, expected = self._random.choice(self._pool)
        delay = self._random.choice([0.0, 0.05, 0.5])
        name = f"soak-{number}"
        if is_aborted:
            answer = self._aborted(name, request, expected, delay)
        else:
            answer = self._complete(name, request, expected)
        task = asyncio.ensure_future(self._watched(name, answer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _watched(self, name: str, answer: Coroutine[Any, Any, None]) -> None:
        started = time.monotonic()
        try:
            await asyncio.wait_for(answer, ANSWER_SECONDS)
        except TimeoutError:
            self.problems.append(f"{name} was not answered")
        except Exception as error:
            self.problems.append(f"{name}: {error!r}")
        else:
            self.answered += 1
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - started)

    async def _complete(self, name: str, request: Request, expected: str) -> None:
        text = await ask(self._engine, request, rid=name)
        if text != expected:
            self.problems.append(f"{name}: {text!r} where {expected!r} was expected")

    async def _aborted(self, name: str, request: Request, expected: str, delay: float) -> None:
        task = asyncio.ensure_future(ask(self._engine, request, rid=name))
        await asyncio.sleep(delay)
        self._engine.tokenizer_manager.abort_request(name)
        text = await task
        if not expected.startswith(text):
            self.problems.append(f"{name}: {text!r}, aborted, is no beginning of {expected!r}")
