"""A real `python -m sglang.launch_server --sidp` with two ranks, as a child process."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

START_SECONDS = 300.0


class Server:
    """In a session of its own, as from a terminal: signals to its group reach nobody else.

    `post` and `get` return decoded JSON.
    """

    def __init__(self, model: Path, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        command += ["--port", str(port), "--device", "cpu", "--dp-size", "2", "--sidp"]
        command += ["--log-level", "error", *arguments]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server has ended:\n{self.wait(0)}")
            try:
                with self.open("/health", timeout=5.0):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise TimeoutError(f"the server was not ready after {START_SECONDS:.0f} s")

    def wait(self, seconds: float) -> str:
        """Until it has ended; what it has written to stderr."""
        return self.process.communicate(timeout=seconds)[1]

    def open(self, path: str, body: Any = None, timeout: float = 120.0, accept: str = "*/*") -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Accept": accept}
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
