"""The entry points: a process of an engine with --sidp never goes on without its main process, nor
without the plugin."""

import os
import subprocess
import sys

from sidp_sgl.scheduler.lifecycle.liveness import ENGINE, Failed, LifelineServer, Message

REGISTER = """
import sys
sys.modules["sidp_sgl.runtime"] = None  # can't be imported
from sidp_sgl import plugin
plugin.register()
"""
PLATFORM = """
from sidp_sgl import plugin
plugin.activate_cpu_platform()
print("goes on")
"""


def run(program: str, engine: str | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, **({ENGINE: engine} if engine else {})}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


def test_a_process_of_an_engine_does_not_go_on_without_the_plugin(engine_name: str) -> None:
    messages: list[Message] = []
    server = LifelineServer(engine_name, messages.append)
    assert run(REGISTER, engine_name).returncode == 1
    server.close()
    (message,) = messages
    assert isinstance(message, Failed) and message.member is None
    assert message.reason.startswith("ModuleNotFoundError: ")


def test_any_other_process_is_left_to_sglang() -> None:
    assert "ModuleNotFoundError: " in run(REGISTER).stderr


def test_a_process_ends_early_where_its_main_process_has_gone(engine_name: str) -> None:
    result = run(PLATFORM, engine_name)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "")
