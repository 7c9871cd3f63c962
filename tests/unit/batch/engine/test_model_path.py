"""A model that does not exist is refused with one line that names the flag."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.demo_job import CHECKPOINT
from sidp_sgl.batch.engine.model_path import check_config, check_path
from sidp_sgl.errors import SidpUsageError


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "/absent"],
        ["--dp-size", "2", "--model-path", "./absent", "--sidp"],
        ["--model=../a/b/absent"],
        ["--model-path=a/b/absent"],
        ["--model", str(CHECKPOINT), "--model", "/absent"],
    ],
)
def test_a_path_that_is_not_there(arguments: list[str]) -> None:
    with pytest.raises(SidpUsageError, match=r"--model-path .*: give a folder with a config\.json"):
        check_path(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model"],
        ["--model", str(CHECKPOINT)],
        ["--model", "Qwen/Qwen3-8B"],  # the Hub's
        ["--model", "s3://bucket/model"],
        ["--model-path-of-another-flag", "/absent"],
    ],
)
def test_what_may_be_there(arguments: list[str]) -> None:
    check_path(arguments)


def server_args(model: str) -> SimpleNamespace:
    return SimpleNamespace(
        model_path=model, trust_remote_code=False, revision=None, model_config_parser="auto"
    )


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(SidpUsageError, match=f"--model-path {tmp_path} can't be used") as caught:
        check_config(server_args(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_models_that_have_one() -> None:
    check_config(server_args(str(CHECKPOINT)))
    check_config(server_args("s3://bucket/model"))
