"""A profile that would end a rank, when it starts or when it is written, is refused."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import ProfileReq

from sidp_sgl.config import SidpConfig
from sidp_sgl.sglang_hooks import arguments, profiling
from sidp_sgl.sglang_hooks.refusals import CallRefused


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"activities": ["MEM"]}, "choose among CPU, GPU"),
        ({"activities": ["CPU", "RPD"]}, "choose among CPU, GPU"),
        ({"activities": []}, "choose among CPU, GPU"),
        ({"profile_by_stage": True}, "needs num_steps"),
        ({"num_steps": -1}, "num_steps -1 is negative"),
        ({"start_step": -3, "num_steps": 1}, "start_step -3 is negative"),
        ({"profile_id": "a/b"}, "profile_id 'a/b'"),
        ({"profile_prefix": "../x"}, "profile_prefix '../x'"),
        ({"profile_prefix": "x" * 300}, "use a shorter one"),
        ({"output_dir": "/proc/nowhere"}, "output_dir '/proc/nowhere' can't be written to"),
        ({"output_dir": "/dev/null"}, "output_dir '/dev/null' can't be written to"),
        ({"output_dir": "a\0b"}, "can't be written to"),
        ({"output_dir": "~no-such-user/x"}, "can't be written to"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(CallRefused) as caught:
        profiling.check_profile(ProfileReq(**fields), is_cpu=True)
    assert reason in str(caught.value) and caught.value.status_code == 400
    assert isinstance(caught.value, ValueError)


def test_what_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    stages = {"profile_by_stage": True, "num_steps": 3, "output_dir": str(folder)}
    profiling.check_profile(ProfileReq(**stages), is_cpu=True)
    assert folder.is_dir()
    profiling.check_profile(ProfileReq(), is_cpu=True)
    profiling.check_profile(ProfileReq(activities=["MEM"]), is_cpu=False)


def test_what_a_rank_refuses_is_status_400() -> None:
    async def rank(*_: Any) -> None:
        raise RuntimeError("Profiling is already in progress. Call /stop_profile first.")

    server_args = SimpleNamespace()
    manager = SimpleNamespace(server_args=server_args)
    with pytest.raises(RuntimeError):
        asyncio.run(profiling._execute_profile(rank, manager, ProfileReq()))
    config = SidpConfig(sidp=True).of_engine("group", "auto", is_server=True)
    arguments.attach(server_args, config)
    with pytest.raises(CallRefused, match="already in progress"):
        asyncio.run(profiling._execute_profile(rank, manager, ProfileReq()))
