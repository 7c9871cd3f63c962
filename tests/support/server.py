"""A real `python -m sglang.launch_server` as a child process."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

START_SECONDS = 300.0


class Server:
    """A running server; `post` and `get` return decoded JSON."""

    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    def open(self, path: str, body: Any = None, timeout: float = 120.0) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        return urllib.request.urlopen(request, timeout=timeout)

    def post(self, path: str, body: Any) -> Any:
        with self.open(path, body) as response:
            return json.load(response)

    def get(self, path: str) -> Any:
        with self.open(path) as response:
            return json.load(response)

    def stream(self, path: str, body: Any) -> list[Any]:
        """The events of a streamed answer, without the closing [DONE]."""
        with self.open(path, {**body, "stream": True}) as response:
            lines = [line.decode().strip() for line in response]
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}")
            try:
                with self.open("/health", timeout=5.0):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise TimeoutError(f"the server was not ready after {START_SECONDS:.0f} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(*arguments: str, **environment: str) -> Iterator[Server]:
    """Start with `arguments`, wait until it answers, terminate at the end."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "sglang.launch_server", "--port", str(port), *arguments],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
    )
    try:
        running = Server(process, port)
        running.wait_until_ready()
        yield running
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)
