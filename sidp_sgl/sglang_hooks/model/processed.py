"""Modules of other ranks' blocks whose form SGLang changes after loading: quantised ones.

They keep their parameter objects, which some methods insist on, without memory. When SGLang has
processed what was loaded, each of them is processed on scratch memory, one at a time, for its final
form and its attributes, and gives the memory back.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType
from torch import nn

from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks.model import placeholders
from sidp_sgl.sglang_hooks.required import Hook

_LOADER = "sglang.srt.model_loader.loader"
_COMPARED = (torch.Tensor, float, int)  # attributes; bool is an int


class ScratchProcessing:
    """`add` every pooled module while the model is built."""

    def __init__(self) -> None:
        self._own: list[tuple[str, nn.Module]] = []
        self._foreign: list[tuple[str, nn.Module]] = []
        self._forms: dict[int, tuple[torch.Size, tuple[int, ...]]] = {}  # by parameter
        self._attributes: dict[str, dict[str, Any]] = {}  # made by processing, by module's path

    def add(self, layer: int | None, name: str, module: nn.Module, *, is_own: bool) -> None:
        """`name`: path of `module` within its layer."""
        if is_own:
            self._own.append((name, module))
            return
        self._foreign.append((name, module))
        for parameter_name, parameter in module.named_parameters():
            self._forms[id(parameter)] = parameter.shape, parameter.stride()
            placeholders.give_memory_back(parameter)
            placeholders.refuse_loading(parameter, f"{name}.{parameter_name} (layer {layer})")

    def hooks(self) -> list[Hook]:
        return [
            Hook(
                f"{_LOADER}.DefaultModelLoader.postprocess_weights",
                self._postprocess,
                HookType.AROUND,
            ),
            Hook(f"{_LOADER}._modules_with_quant_method", self._without_foreign, HookType.AROUND),
        ]

    def _without_foreign(self, original: Callable, model: nn.Module) -> Iterator[Any]:
        foreign = {id(part) for _, module in self._foreign for part in module.modules()}
        return ((m, method) for m, method in original(model) if id(m) not in foreign)

    def _postprocess(self, original: Callable, model: nn.Module, target_device: Any) -> None:
        before = [_attributes(module) for _, module in self._own]
        original(model, target_device)
        for (name, module), attributes in zip(self._own, before, strict=True):
            self._check_attributes(name, module, attributes)
        for name, module in self._foreign:
            self._process(name, module, target_device)

    def _process(self, name: str, module: nn.Module, device: Any) -> None:
        for parameter in module.parameters():
            shape, stride = self._forms.pop(id(parameter))
            parameter.data = _harmless(
                torch.empty_strided(shape, stride, dtype=parameter.dtype, device=device)
            )
        before = _attributes(module)
        for part in module.modules():
            if (method := getattr(part, "quant_method", None)) is not None:
                method.process_weights_after_loading(part)
        self._check_attributes(name, module, before)
        for tensor_name, tensor in list(placeholders.named_tensors([(name, module)])):
            local = tensor_name.removeprefix(f"{name}.")
            placeholders.make_placeholder(module, local, tensor)

    def _check_attributes(
        self, name: str, module: nn.Module, before: dict[str, dict[str, Any]]
    ) -> None:
        """What processing makes beside parameters must not depend on the weights: then it is alike
        in all layers, and right in those that were processed without theirs."""
        for path, attributes in _attributes(module).items():
            made = {
                key: value
                for key, value in attributes.items()
                if not _equal(before.get(path, {}).get(key), value)
            }
            part = f"{name}.{path}".rstrip(".")
            known = self._attributes.setdefault(part, made)
            for key in sorted({*known, *made}):
                if not _equal(known.get(key), made.get(key)):
                    raise SidpError(
                        f"--sidp: {key} of {part} is made from its weights while they are "
                        "loaded, so it can't be pooled: start without --sidp"
                    )


def _attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Path → name → value of what the module and its parts hold beside tensors and modules."""
    return {
        path: {key: value for key, value in vars(part).items() if isinstance(value, _COMPARED)}
        for path, part in module.named_modules()
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def _harmless(memory: torch.Tensor) -> torch.Tensor:
    """Values that any method can process: scales of one, codes of zero."""
    if memory.dtype.itemsize == 1:  # 8-bit floats can't be filled
        memory.view(torch.uint8).zero_()
        return memory
    return memory.fill_(1 if memory.dtype.is_floating_point else 0)
