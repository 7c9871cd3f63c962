"""Reads from safetensors what this rank needs and nothing else.

SGLang's own iterators read whole shards; these read tensor by tensor and skip what belongs to units
of other ranks.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import safetensors
import torch
from sglang.srt.plugins.hook_registry import HookType
from torch import nn

from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks.cpu import memory as cpu_memory
from sidp_sgl.sglang_hooks.required import Hook

# Checkpoints store what SGLang stacks into one module as separate tensors: shared experts may be
# loaded as further ones of the experts.
_STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "experts": ("shared_experts", "shared_expert"),
}


class CheckpointReader:
    """One rank's reading: skips the tensors of placeholder modules, counts the bytes of others."""

    def __init__(
        self,
        is_placeholder: Callable[[nn.Module], bool],
        before_loading: Callable[[nn.Module], None],
    ) -> None:
        self.bytes_read = 0
        self._before_loading = before_loading
        self._is_placeholder = is_placeholder
        self._skipped: re.Pattern[str] | None = None

    def hooks(self) -> list[Hook]:
        iterators = (
            "safetensors_weights_iterator",
            "buffered_multi_thread_safetensors_weights_iterator",
        )
        module = "sglang.srt.model_loader.weight_utils"
        return [
            Hook(
                "sglang.srt.model_loader.loader.DefaultModelLoader.load_weights_only",
                self._load_weights_only,
                HookType.AROUND,
            ),
            *(Hook(f"{module}.{name}", self._read, HookType.REPLACE) for name in iterators),
        ]

    def _load_weights_only(self, original: Any, model: nn.Module, *rest: Any) -> Any:
        self._before_loading(model)
        names = [name for name, module in model.named_modules() if self._is_placeholder(module)]
        self._skipped = re.compile("|".join(map(_checkpoint_pattern, names)) or "(?!)")
        result = original(model, *rest)
        cpu_memory.charge_model(model)
        return result

    def _read(self, files: list[str], *_: Any, **__: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if self._skipped is None:
            raise SidpError("--sidp: weights were read before the model was known")
        for path in sorted(files):
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if self._skipped.match(name):
                        continue
                    tensor = file.get_tensor(name)
                    self.bytes_read += tensor.numel() * tensor.element_size()
                    yield name, tensor


def _checkpoint_pattern(module_name: str) -> str:
    """Pattern of the checkpoint names of a unit's tensors: 'a.qkv_proj' → 'a.(q_proj|…).'"""
    path, dot, leaf = module_name.rpartition(".")
    leaves = "|".join(map(re.escape, (leaf, *_STACKED.get(leaf, ()))))
    return rf"{re.escape(path + dot)}(?:{leaves})\."
