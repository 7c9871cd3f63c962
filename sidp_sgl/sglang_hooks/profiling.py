"""`/start_profile` and `Engine.start_profile`: what would end a rank is refused first.

SGLang's ranks start and stop their profilers between two steps, and end where that fails.
"""

import os
from pathlib import Path
from typing import Any

from sglang.srt.platforms import current_platform
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks import arguments
from sidp_sgl.sglang_hooks.cpu.platform import SidpCpuPlatform
from sidp_sgl.sglang_hooks.refusals import CallRefused
from sidp_sgl.sglang_hooks.required import Hook

_CPU_ACTIVITIES = ("CPU", "GPU")  # the latter, which SGLang adds by default, records nothing
_GPU_ACTIVITIES = (*_CPU_ACTIVITIES, "MEM", "CUDA_PROFILER")


def check_profile(request: Any, is_cpu: bool) -> None:
    """`request`: a ProfileReq. Raises CallRefused."""
    known = _CPU_ACTIVITIES if is_cpu else _GPU_ACTIVITIES
    unknown = [name for name in request.activities or () if name not in known]
    if unknown or request.activities == []:
        raise CallRefused(
            f"activities {request.activities} can't be profiled here: choose among "
            f"{', '.join(known)}"
        )
    if request.profile_by_stage and not request.num_steps:
        raise CallRefused("profile_by_stage needs num_steps: say how many steps of each stage")
    for field in ("num_steps", "start_step"):
        if (getattr(request, field) or 0) < 0:
            raise CallRefused(f"{field} {getattr(request, field)} is negative: use 1 or more")
    for field in ("profile_id", "profile_prefix"):
        if "/" in (name := getattr(request, field) or "") or len(name) > 100:
            raise CallRefused(f"{field} {name!r} can't be part of a file's name: use a shorter one")
    _check_folder(request.output_dir or os.getenv("SGLANG_TORCH_PROFILER_DIR", "/tmp"))


def _check_folder(folder: str) -> None:
    """Ranks write into it when the profile ends; they run on this machine."""
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(path, os.W_OK | os.X_OK)
    except (OSError, RuntimeError, ValueError) as error:  # also an unknown home, a null character
        raise CallRefused(f"output_dir {folder!r} can't be written to: {error}") from None
    if not is_writable:
        raise CallRefused(f"output_dir {folder!r} can't be written to: permission denied")


async def _start_profile(original: Any, manager: Any, request: Any = None) -> Any:
    """`TokenizerManager.start_profile`."""
    if request is not None and arguments.config_of(manager.server_args) is not None:
        check_profile(request, current_platform.device_name == SidpCpuPlatform.device_name)
    return await original(manager, request)


async def _execute_profile(original: Any, manager: Any, request: Any) -> Any:
    """What a rank refuses, such as a second profile at once, is status 400, not 500."""
    try:
        return await original(manager, request)
    except RuntimeError as error:
        if arguments.config_of(manager.server_args) is None:
            raise
        raise CallRefused(str(error)) from None


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
HOOKS = [
    Hook(f"{_MANAGER}.start_profile", _start_profile, HookType.AROUND),
    Hook(f"{_MANAGER}._execute_profile", _execute_profile, HookType.AROUND),
]
