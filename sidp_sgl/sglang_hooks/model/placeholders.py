"""Parameters without memory, and parameters that view pool memory.

Room: sglang_hooks. Models index `params_dict[name]` while loading, so a placeholder keeps the
name and every attribute of what it stands for.
"""

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import nn


def named_tensors(units: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter]]:
    """('mlp.down_proj.weight', parameter) of all units, in a fixed order."""
    for unit_name, module in units:
        for name, parameter in module.named_parameters():
            yield f"{unit_name}.{name}", parameter


def replace(layer: nn.Module, name: str, data: torch.Tensor, **attributes: Any) -> None:
    """Put `data` in the place of parameter `name` of `layer`; attributes are kept and added to."""
    path, _, leaf = name.rpartition(".")
    module = layer.get_submodule(path)
    old = module._parameters[leaf]
    new = nn.Parameter(data, requires_grad=False)
    new.__dict__.update(old.__dict__)
    new.__dict__.update(attributes)
    module._parameters[leaf] = new


def make_placeholder(layer: nn.Module, name: str) -> None:
    """Turn a parameter into a meta tensor that refuses to be loaded."""
    parameter = layer.get_parameter(name)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"{name} of a layer owned by another rank was read from the checkpoint")

    # Also where there was no loader: SGLang's default one would copy into nowhere in silence.
    replace(layer, name, torch.empty_like(parameter, device="meta"), weight_loader=refuse)


def give_memory_back(parameter: nn.Parameter) -> None:
    """Let a parameter be empty until its data is a view of pool memory. The object, and with it
    what knows how to load it, stays."""
    parameter.data = parameter.data.new_empty(0)


def view_pool(layer: nn.Module, name: str, view: torch.Tensor) -> None:
    """Let a parameter view pool memory, which is not the model's own."""
    replace(layer, name, view, sidp_pooled=True)
