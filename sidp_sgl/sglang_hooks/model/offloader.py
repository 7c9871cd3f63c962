"""SGLang's offloader interface as the way into the model: sees every layer, runs after loading.

Room: sglang_hooks. While layers are built, those of other ranks become placeholders, and the rank's
own tensors views of its blocks, into which they are loaded; then the ranks meet, and the slots take
over.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.utils.offloader import BaseOffloader
from torch import nn

from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks.cpu import memory as cpu_memory
from sidp_sgl.sglang_hooks.model import placeholders
from sidp_sgl.sglang_hooks.model.units import Unit, find_units, pooled_unit
from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.execution import UnitExecution
from sidp_sgl.weightpool.layout import make_layout
from sidp_sgl.weightpool.pool import WeightPool

MeetPeers = Callable[[list[PooledUnit]], UnitExecution]


class PoolOffloader(BaseOffloader):
    """Connects one model to one pool. `meet_peers` connects the pool with those of the others, and
    says how units are computed from then on."""

    def __init__(self, pool: WeightPool, pooled_units: str, meet_peers: MeetPeers) -> None:
        self._pool = pool
        self._pooled_units = pooled_units
        self._meet_peers = meet_peers
        self._layers: list[tuple[nn.Module, list[Unit]]] = []
        self._placeholder_units: set[int] = set()
        self._blocks: dict[int, dict[str, torch.Tensor]] = {}  # of own layers
        self.unmaterialised = 0  # placeholder tensors that held no memory when loading had ended

    def hook(self) -> Hook:
        return Hook("sglang.srt.utils.offloader.create_offloader", lambda _: self, HookType.AROUND)

    def is_placeholder(self, module: nn.Module) -> bool:
        return id(module) in self._placeholder_units

    def wrap_modules(
        self, all_modules_generator: Iterable[nn.Module], *_: Any, **__: Any
    ) -> list[nn.Module]:
        if self._layers:
            raise SidpError("--sidp: the model has a second stack of layers, which can't be pooled")
        layouts = {}
        for index, layer in enumerate(all_modules_generator):
            units = find_units(layer, index, self._pooled_units)
            self._layers.append((layer, units))
            if index >= len(self._pool.owners):
                continue
            tensors = list(placeholders.named_tensors(_pairs(units)))
            if self._pool.owns(index):
                layouts[index] = make_layout(tensors)
                for parameter in dict(tensors).values():
                    placeholders.give_memory_back(parameter)
            else:
                self._placeholder_units.update(id(unit.module) for unit in units)
                for tensor_name, _ in tensors:
                    placeholders.make_placeholder(layer, tensor_name)
        if len(self._layers) != len(self._pool.owners):
            raise SidpError(
                f"--sidp: the model has {len(self._layers)} layers where its config says "
                f"{len(self._pool.owners)}"
            )
        self._blocks = self._pool.own(layouts)
        for index, block in self._blocks.items():
            _, units = self._layers[index]
            for name, parameter in placeholders.named_tensors(_pairs(units)):
                parameter.data = block[name]
        return [layer for layer, _ in self._layers]

    def post_init(self) -> None:
        self._view_blocks()
        modules = [unit.module for _, units in self._layers for unit in units]
        pooled_units = self._pooled_unit_list()
        execution = self._meet_peers(pooled_units)
        views = self._pool.start()
        for index, (layer, units) in enumerate(self._layers):
            if not self._pool.owns(index):
                self._view_slots(layer, units, views[index])
        for module, pooled in zip(modules, pooled_units, strict=True):
            module.forward = partial(execution.run, pooled)
        sizes = self._pool.bytes()
        cpu_memory.charge_pool(sizes.owned_bytes + sizes.cache_bytes + execution.staging_bytes)
        first_layer, _ = self._layers[0]
        first_layer._derived_weight_cache_error = (  # type: ignore[assignment]
            "weights can't be updated at run time with --sidp: restart the engine"
        )

    def _view_blocks(self) -> None:
        """What loading has put elsewhere, in the same form, moves into its block."""
        for index, block in self._blocks.items():
            layer, units = self._layers[index]
            for name, parameter in list(placeholders.named_tensors(_pairs(units))):
                view = block[name]
                if _form(parameter) != _form(view):
                    raise SidpError(f"--sidp: {name} has changed its form while it was loaded")
                if parameter.data_ptr() != view.data_ptr():
                    view.copy_(parameter)
                placeholders.view_pool(layer, name, view)

    def _view_slots(
        self, layer: nn.Module, units: list[Unit], views: dict[str, torch.Tensor]
    ) -> None:
        for name, parameter in list(placeholders.named_tensors(_pairs(units))):
            if not parameter.is_meta:
                raise SidpError(f"--sidp: {name} of another rank's layer was materialised")
            view = views[name]
            if view.shape != parameter.shape or view.dtype != parameter.dtype:
                raise SidpError(f"--sidp: {name} differs from its owner's in shape or dtype")
            self.unmaterialised += 1
            placeholders.view_pool(layer, name, view)

    def _pooled_unit_list(self) -> list[PooledUnit]:
        """All units, numbered in the order of the forward pass."""
        numbers = itertools.count()
        return [
            pooled_unit(unit, next(numbers), index, is_last=unit is units[-1])
            for index, (_, units) in enumerate(self._layers)
            for unit in units
        ]


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _pairs(units: list[Unit]) -> list[tuple[str, nn.Module]]:
    return [(unit.name, unit.module) for unit in units]
