"""An SGLang platform for machines without an accelerator: plain PyTorch kernels, no sgl_kernel.

`activate()` wins only where no accelerator is present and SGLang's own CPU engine was not asked for
(`SGLANG_USE_CPU_ENGINE=1`), so it never displaces CUDA.
"""

import os
import sys
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks.cpu import cores as cpu_cores
from sidp_sgl.sglang_hooks.cpu import memory as cpu_memory
from sidp_sgl.sglang_hooks.required import Hook

QUALIFIED_NAME = f"{__name__}.SidpCpuPlatform"
DEFAULT_MEM_FRACTION_STATIC = 0.9


def activate() -> str | None:
    """Return the platform's class path, or None where another platform should win."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    accelerators = [
        torch.cuda.is_available,
        torch.xpu.is_available,
        torch.backends.mps.is_available,
    ]
    for name in ("npu", "musa", "hpu"):
        module = getattr(torch, name, None)
        if module is not None:
            accelerators.append(module.is_available)
    if any(is_available() for is_available in accelerators):
        return None
    # Kernels for GPUs, which SGLang does without where they are not installed: without them every
    # process starts a tenth sooner and takes 145 MB less.
    sys.modules.setdefault("flashinfer", None)  # type: ignore[arg-type]
    return QUALIFIED_NAME


class SidpCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """`--device cpu` with torch-native attention and a device memory that may be pretended."""

    _enum = PlatformEnum.OOT
    device_name = "sidp_cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Bytes of one rank's device: `SIDP_CPU_DEVICE_MEMORY`, else a share of the machine's."""
        return cpu_memory.device_total_bytes()

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        """Bytes of the rank's device that are taken (weights and slots; later the KV cache)."""
        return float(cpu_memory.device_used_bytes())

    def post_load_model(self, model: torch.nn.Module) -> None:
        cpu_memory.charge_model(model)

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Defaults for fields that the user left unset (`server_args` records what is written)."""
        if server_args.attention_backend in (None, "intel_amx"):  # intel_amx needs sgl_kernel
            server_args.attention_backend = self.get_default_attention_backend()
        server_args.sampling_backend = "pytorch"
        server_args.sleep_on_idle = True
        server_args.disable_cuda_graph = True
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = DEFAULT_MEM_FRACTION_STATIC
        num_processes = server_args.dp_size * server_args.tp_size * server_args.pp_size
        cpu_cores.divide_cores(num_processes)
        cpu_memory.divide_memory(num_processes)


def _available_memory(original: Any, device: str, *args: Any, **kwargs: Any) -> float:
    """SGLang asks the machine for device `cpu`, and the platform for any it does not know."""
    return original(SidpCpuPlatform.device_name if device == "cpu" else device, *args, **kwargs)


MEMORY_HOOK = Hook(
    "sglang.srt.utils.common.get_available_gpu_memory", _available_memory, HookType.AROUND
)
