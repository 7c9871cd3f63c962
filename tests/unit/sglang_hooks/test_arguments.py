"""Whose requests an engine gets: a server's are its users', an `Engine`'s the program's own."""

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

from bench.demo_job import CHECKPOINT
from sidp_sgl.sglang_hooks import arguments

COMMAND_LINE = ["--model-path", str(CHECKPOINT), "--device", "cpu", "--dp-size", "2", "--sidp"]


def is_server(server_args: Any) -> bool:
    config = arguments.config_of(server_args)
    assert config is not None
    return config.is_server


@pytest.fixture
def from_command_line() -> Any:
    load_plugins()
    return prepare_server_args(COMMAND_LINE)


def test_a_command_line_is_a_server_s(from_command_line: Any) -> None:
    assert is_server(from_command_line)


def test_an_engine_is_its_program_s_own(from_command_line: Any) -> None:
    """Also one whose arguments are a command line's, as run-batch's are."""
    keywords = arguments._server_args_from_keywords(
        model_path=str(CHECKPOINT), device="cpu", dp_size=2, sidp=True
    )
    assert not is_server(keywords)
    seen = []
    arguments._init_engine(
        lambda _, server_args: seen.append(is_server(server_args)),
        SimpleNamespace(),
        server_args=from_command_line,
    )
    assert seen == [False]
