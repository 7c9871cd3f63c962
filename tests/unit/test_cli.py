"""`sidp-sgl` and `python -m sidp_sgl` without what they need: usage and exit code 2."""

import sys

import pytest

from sidp_sgl import __main__ as module
from sidp_sgl import cli


def test_no_command_is_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sidp-sgl"])
    assert cli.main() == cli.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: sidp-sgl COMMAND")


def test_help_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plans"]) == 2
    assert "unknown command 'plans': use one of plan" in capsys.readouterr().err


def test_no_module_is_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sidp_sgl"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m sidp_sgl MODULE")
