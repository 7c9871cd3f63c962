"""Tensors of a module without memory, and tensors that view pool memory.

Models index `params_dict[name]` while loading, so a placeholder keeps the name and every attribute
of what it stands for.
"""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn


def named_tensors(units: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, torch.Tensor]]:
    """('mlp.down_proj.weight', tensor) of all units: parameters, then buffers, in a fixed order.
    Empty ones have no bytes to pool and are left out."""
    for unit_name, module in units:
        for tensors in (module.named_parameters(), module.named_buffers()):
            for name, tensor in tensors:
                if tensor.numel():
                    yield f"{unit_name}.{name}", tensor


def _owner_of(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return layer.get_submodule(path), leaf


def replace(
    layer: nn.Module, name: str, data: torch.Tensor, *, is_parameter: bool, **attributes: Any
) -> None:
    """Put `data` in the place of tensor `name` of `layer`, or there anew; attributes are kept and
    added to."""
    module, leaf = _owner_of(layer, name)
    tensors = module._parameters if is_parameter else module._buffers
    old = tensors.get(leaf)
    new = nn.Parameter(data, requires_grad=False) if is_parameter else data
    new.__dict__.update({**(old.__dict__ if old is not None else {}), **attributes})
    tensors[leaf] = new  # type: ignore[index, assignment]


def make_placeholder(layer: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Turn a tensor into a meta tensor that refuses to be loaded."""
    # Also where there was no loader: SGLang's default one would copy into nowhere in silence.
    is_parameter = isinstance(tensor, nn.Parameter)
    meta = torch.empty_like(tensor, device="meta", requires_grad=False)
    replace(layer, name, meta, is_parameter=is_parameter, weight_loader=_refusal(name))


def refuse_loading(parameter: torch.Tensor, name: str) -> None:
    """The same for a parameter that stays as an object; SGLang's own classes keep their loader in a
    field of another name."""
    field = "_weight_loader" if "_weight_loader" in parameter.__dict__ else "weight_loader"
    parameter.__dict__[field] = _refusal(name)


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"{name} of a layer owned by another rank was read from the checkpoint")

    return refuse


def give_memory_back(parameter: torch.Tensor) -> None:
    """Let a tensor be empty until its data is a view of pool memory. The object, and with it what
    knows how to load it, stays."""
    parameter.data = parameter.data.new_empty(0)


def view_pool(layer: nn.Module, name: str, view: torch.Tensor, *, is_parameter: bool) -> None:
    """Let a tensor view pool memory, which is not the model's own."""
    replace(layer, name, view, is_parameter=is_parameter, sidp_pooled=True)
