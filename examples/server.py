"""A server with SiDP, asked by the OpenAI client: `python -m examples.server`.

It starts the server, asks it, and stops it. The same by hand, in two terminals:
`python -m sglang.launch_server --model-path ... --dp-size 4 --sidp`, then the part from `OpenAI(`.
"""

import json
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError

from openai import OpenAI

from examples.demo_model.arithmetic import few_shot_header, held_out_problems

PORT = 30017
URL = f"http://127.0.0.1:{PORT}"
COMMAND = [
    *(sys.executable, "-m", "sglang.launch_server", "--port", str(PORT)),
    *("--model-path", "examples/demo_model/checkpoint", "--device", "cpu"),
    *("--dp-size", "4", "--sidp", "--enable-metrics", "--log-level", "error"),
]


def wait_until_ready(server: subprocess.Popen, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit("the server has ended, see above")
        try:
            urllib.request.urlopen(f"{URL}/health", timeout=5)
            return
        except (URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"the server was not ready after {seconds:.0f} s")


def ask() -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key="none")
    header = few_shot_header()
    problems = [problem for problem, _ in held_out_problems(32)]

    def answer(problem: str) -> str:
        reply = client.completions.create(
            model="default", prompt=header + problem, max_tokens=96, temperature=0
        )
        return reply.choices[0].text

    with ThreadPoolExecutor(32) as threads:  # many at once: that is what SiDP is for
        for problem, text in list(zip(problems, threads.map(answer, problems), strict=True))[:4]:
            print(problem + text)
    chat = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": header + problems[0]}],
        max_tokens=96,
        temperature=0,
        stream=True,
    )
    print("streamed:", "".join(chunk.choices[0].delta.content or "" for chunk in chat))
    with urllib.request.urlopen(f"{URL}/server_info") as response:
        states = json.load(response)["internal_states"]
    for sidp in (state["sidp"] for state in states):
        print(f"rank {sidp['dp_rank']}: {sidp['iterations']} steps, mode {sidp['mode']}")


def main() -> None:
    server = subprocess.Popen(COMMAND)
    try:
        wait_until_ready(server)
        ask()
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
