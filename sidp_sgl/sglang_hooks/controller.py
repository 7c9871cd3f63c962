"""What SiDP does at each place of SGLang's `DataParallelController`."""

from collections.abc import Callable

from sglang.srt.platforms import current_platform
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.config import SidpConfig
from sidp_sgl.sglang_hooks.cpu.platform import SidpCpuPlatform
from sidp_sgl.sglang_hooks.cpu.sleeping_loop import sleeping_loop
from sidp_sgl.sglang_hooks.cuda import colocation
from sidp_sgl.sglang_hooks.dispatch.event_loop import DispatchLoop
from sidp_sgl.sglang_hooks.failures.reports import ControllerReports
from sidp_sgl.sglang_hooks.required import Hook

_CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"


def controller_hooks(config: SidpConfig | None, num_ranks: int) -> list[Hook]:
    """`config`: None without --sidp."""
    is_cpu = current_platform.device_name == SidpCpuPlatform.device_name
    if config is None:
        return [_event_loop(sleeping_loop)] if is_cpu else []
    reports = ControllerReports(config.engine)
    hooks = [Hook("multiprocessing.Process.start", reports.start, HookType.AROUND)]
    if config.sidp_colocate:
        launch = f"{_CONTROLLER}.launch_tensor_parallel_group"
        hooks.append(Hook(launch, colocation.launch_on_first_gpu, HookType.AROUND))
    if config.own_dispatch:
        dispatch = DispatchLoop(config.engine, num_ranks, is_job=not config.is_server)
        hooks.append(_event_loop(dispatch.event_loop))
    elif is_cpu:
        hooks.append(_event_loop(sleeping_loop))
    return hooks


def _event_loop(loop: Callable) -> Hook:
    """Instead of SGLang's, which spins."""
    return Hook(f"{_CONTROLLER}.event_loop", loop, HookType.AROUND)
