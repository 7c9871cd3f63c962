"""All ranks on one GPU, each with an equal part of its memory (`--sidp-colocate`): for work on the
CUDA transport where there is one GPU.
"""

from collections.abc import Callable
from typing import Any

import torch

# What a process takes beside PyTorch's allocator: context, loaded kernels, library workspaces.
CONTEXT_BYTES = 1 << 30


def launch_on_first_gpu(
    original: Any, controller: Any, server_args: Any, port_args: Any, base_gpu_id: int,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """`DataParallelController.launch_tensor_parallel_group`."""
    return original(controller, server_args, port_args, 0, *args, **kwargs)


def divide_memory(num_ranks: int, pool_bytes: Callable[[], int]) -> None:
    """Let this process see a device of 1/num_ranks of the memory, of which it has used what
    PyTorch has reserved, its shared memory (`pool_bytes`), and CONTEXT_BYTES."""
    ask = torch.cuda.mem_get_info

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        _, total = ask(device)
        used = torch.cuda.memory_reserved(device) + pool_bytes() + CONTEXT_BYTES
        return max(total // num_ranks - used, 0), total // num_ranks

    torch.cuda.mem_get_info = mem_get_info
