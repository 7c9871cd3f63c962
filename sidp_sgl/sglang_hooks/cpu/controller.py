"""On CPU ranks: the DP controller waits for requests instead of spinning on a core of theirs.

Room: sglang_hooks. Also sends SGLang's memory questions for `cpu` to the platform's getters.
"""

from typing import Any

import zmq
from sglang.srt.managers.io_struct import sock_recv
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks.cpu.platform import SidpCpuPlatform
from sidp_sgl.sglang_hooks.required import Hook

_POLL_MILLISECONDS = 1000


def _event_loop(original: Any, controller: Any) -> None:
    """`DataParallelController.event_loop`, asleep between requests."""
    poller = zmq.Poller()
    poller.register(controller.recv_from_tokenizer, zmq.POLLIN)
    while True:
        controller.soft_watchdog.feed()
        poller.poll(_POLL_MILLISECONDS)
        while True:
            try:
                request = sock_recv(controller.recv_from_tokenizer, flags=zmq.NOBLOCK)
            except zmq.ZMQError:
                break
            controller._request_dispatcher(request)


def _available_memory(original: Any, device: str, *args: Any, **kwargs: Any) -> float:
    """SGLang asks the machine for device `cpu`, and the platform for any it does not know."""
    return original(SidpCpuPlatform.device_name if device == "cpu" else device, *args, **kwargs)


CONTROLLER_HOOKS = [
    Hook(
        "sglang.srt.managers.data_parallel_controller.DataParallelController.event_loop",
        _event_loop,
        HookType.AROUND,
    ),
]
MEMORY_HOOKS = [
    Hook("sglang.srt.utils.common.get_available_gpu_memory", _available_memory, HookType.AROUND),
]
