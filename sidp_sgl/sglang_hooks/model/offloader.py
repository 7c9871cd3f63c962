"""SGLang's offloader interface as the way into the model: sees every layer, runs after loading.

While layers are built, the blocks of other ranks become placeholders. What SGLang loads as it is
(`loads_in_place`) is loaded straight into the rank's own blocks; else it is loaded and processed in
memory of its own, and laid out in blocks afterwards, and other ranks' units are processed without
their weights (`processed.py`). Then the ranks meet, and the slots take over, in the layouts of the
owners.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.utils.offloader import BaseOffloader
from torch import nn

from sidp_sgl.config import ALL
from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks import required
from sidp_sgl.sglang_hooks.cpu import memory as cpu_memory
from sidp_sgl.sglang_hooks.model import placeholders
from sidp_sgl.sglang_hooks.model.processed import ScratchProcessing
from sidp_sgl.sglang_hooks.model.tables import Table, find_tables, head_hook
from sidp_sgl.sglang_hooks.model.units import Unit, find_blocks, pooled_unit, use_one_stream
from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.execution import UnitExecution
from sidp_sgl.weightpool.layout import BlockLayout, make_layout
from sidp_sgl.weightpool.pool import WeightPool

MeetPeers = Callable[[list[PooledUnit]], UnitExecution]


@dataclass(frozen=True)
class _Block:
    """The units of one block, named from the module `root` on."""

    root: nn.Module
    units: list[Unit]
    layer: int | None  # that it belongs to, if any
    is_fetched: bool = True  # else others read it where it lies, and no unit is called

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(placeholders.named_tensors([(unit.name, unit.module) for unit in self.units]))


class PoolOffloader(BaseOffloader):
    """Connects one model to one pool. `meet_peers` connects the pool with those of the others, and
    says how units are computed from then on."""

    def __init__(
        self,
        pool: WeightPool,
        pooled_units: str,
        meet_peers: MeetPeers,
        *,
        loads_in_place: bool = True,
    ) -> None:
        self._pool = pool
        self._pooled_units = pooled_units
        self._meet_peers = meet_peers
        self._loads_in_place = loads_in_place
        self._layers: list[nn.Module] = []
        self._blocks: list[_Block] = []
        self._tables: list[Table] = []
        self.processing = ScratchProcessing()
        self._layouts: dict[int, BlockLayout] = {}  # of own blocks
        self._memory: dict[int, torch.Tensor] = {}  # of own blocks
        self._placeholder_modules: set[int] = set()
        self.unmaterialised = 0  # placeholder tensors that held no memory when loading had ended

    def hooks(self) -> list[Hook]:
        target = "sglang.srt.utils.offloader.create_offloader"
        processing = [] if self._loads_in_place else self.processing.hooks()
        return [Hook(target, lambda _: self, HookType.AROUND), *processing]

    def is_placeholder(self, module: nn.Module) -> bool:
        return id(module) in self._placeholder_modules

    def owned_layers(self) -> list[int]:
        """Decoder layers of which this rank owns a block."""
        layers = {self._blocks[block].layer for block in self._layouts}
        return sorted(layer for layer in layers if layer is not None)

    def wrap_modules(
        self, all_modules_generator: Iterable[nn.Module], *_: Any, **__: Any
    ) -> list[nn.Module]:
        if self._layers:
            raise SidpError("--sidp: the model has a second stack of layers, which can't be pooled")
        for index, layer in enumerate(all_modules_generator):
            self._layers.append(layer)
            for units in find_blocks(layer, index, self._pooled_units):
                use_one_stream(layer, units)
                self._add_block(_Block(layer, units, index))
        expected = self._pool.placement.num_layers
        if len(self._layers) != expected:
            raise SidpError(
                f"--sidp: the model has {len(self._layers)} layers where its config says {expected}"
            )
        return self._layers

    def before_loading(self, model: nn.Module) -> None:
        """The model is complete."""
        if self._pooled_units == ALL:
            self._add_tables(model)
        if self._loads_in_place:
            self._own_blocks()

    def _add_tables(self, model: nn.Module) -> None:
        placement = self._pool.placement
        largest = max(map(placement.block_bytes, range(len(placement.blocks))))
        self._tables = find_tables(model, largest)
        for table in self._tables:
            own = []
            for piece in table.pieces:
                root = nn.ModuleDict({"piece": piece})
                self._add_block(_Block(root, [Unit("piece", piece)], None, table.is_head))
                if not self.is_placeholder(piece):
                    own.append(piece)
            table.load_into(own)
            if not own:
                self._placeholder_modules.update(map(id, table.modules))
            if table.is_head:
                required.apply([head_hook(table)])

    def _add_block(self, block: _Block) -> None:
        """While the model is built: no rank ever holds more than its own blocks and one more."""
        tensors = block.tensors()
        layout = make_layout(tensors.items())
        index = self._pool.add_block(layout.num_bytes, block.layer, is_fetched=block.is_fetched)
        self._blocks.append(block)
        is_own = self._pool.owns(index)
        if not self._loads_in_place:
            for unit in block.units:
                self.processing.add(block.layer, unit.name, unit.module, is_own=is_own)
        if not is_own:
            self._placeholder_modules.update(id(unit.module) for unit in block.units)
            for name, tensor in tensors.items() if self._loads_in_place else ():
                placeholders.make_placeholder(block.root, name, tensor)
            return
        self._layouts[index] = layout
        if self._loads_in_place:
            for spec in layout.tensors:
                if spec.is_parameter:
                    placeholders.give_memory_back(tensors[spec.name])

    def _own_blocks(self) -> None:
        """Let own tensors be views of the rank's blocks."""
        self._memory = self._pool.own(self._layouts)
        for index, layout in self._layouts.items():
            root = self._blocks[index].root
            for spec in layout.tensors:
                view = spec.view(self._memory[index])
                module, _, leaf = spec.name.rpartition(".")
                tensor = getattr(root.get_submodule(module), leaf)
                if tensor.numel():
                    view.copy_(tensor)
                tensor.data = view

    def post_init(self) -> None:
        if self._loads_in_place:
            self._check_blocks()
        elif not self._memory:
            self._lay_out()
        for index, layout in self._layouts.items():
            self._view(self._blocks[index], layout, layout.views(self._memory[index]))
        units = self._units()
        pooled_units = [
            pooled_unit(unit, number, index, is_last=unit is self._blocks[index].units[-1])
            for number, (index, unit) in enumerate(units)
        ]
        execution = self._meet_peers(pooled_units)
        slots = self._pool.start()
        for index in self._pool.placement.unfetched:
            if not self._pool.owns(index):
                slots[index] = self._pool.owner_views(index)
        for index, views in slots.items():
            self._adopt(self._blocks[index], self._pool.layouts[index], views)
        self._pool.on_move = self._move
        for (_, unit), pooled in zip(units, pooled_units, strict=True):
            unit.module.forward = partial(execution.run, pooled)
        self._gather_embedding()
        placement, rank = self._pool.placement, self._pool.rank
        cpu_memory.charge_pool(
            placement.owned_bytes(rank) + placement.cache_bytes(rank) + execution.staging_bytes
        )
        self._layers[0]._derived_weight_cache_error = (  # type: ignore[assignment]
            "weights can't be updated at run time with --sidp: restart the engine"
        )

    def _lay_out(self) -> None:
        """What SGLang has loaded and processed moves into blocks of its final form."""
        self._layouts = {
            index: make_layout(self._blocks[index].tensors().items()) for index in self._layouts
        }
        self._own_blocks()

    def _check_blocks(self) -> None:
        """What loading has put elsewhere, in the same form, moves into its block."""
        for index, layout in self._layouts.items():
            tensors = self._blocks[index].tensors()
            for spec in layout.tensors:
                tensor, view = tensors.get(spec.name), spec.view(self._memory[index])
                if tensor is None or _form(tensor) != _form(view):
                    raise SidpError(f"--sidp: {spec.name} has changed its form while it was loaded")
                if tensor.data_ptr() != view.data_ptr():
                    view.copy_(tensor)

    def _view(self, block: _Block, layout: BlockLayout, views: dict[str, torch.Tensor]) -> None:
        for spec in layout.tensors:
            view = views[spec.name]
            placeholders.view_pool(block.root, spec.name, view, is_parameter=spec.is_parameter)

    def _adopt(self, block: _Block, layout: BlockLayout, views: dict[str, torch.Tensor]) -> None:
        """Another rank's block has the form that its owner's has."""
        tensors = block.tensors()
        forms = {name: _form(tensor) for name, tensor in tensors.items()}
        if forms != {name: _form(view) for name, view in views.items()}:
            raise SidpError(
                f"--sidp: layer {block.layer} has another form at the rank that owns it"
            )
        for name, tensor in tensors.items():
            if not tensor.is_meta:
                raise SidpError(f"--sidp: {name} of another rank's layer was materialised")
            self.unmaterialised += 1
        self._view(block, layout, views)

    def _move(self, index: int, views: dict[str, torch.Tensor]) -> None:
        """Another rank's block lies elsewhere from now on."""
        tensors = self._blocks[index].tensors()
        for name, view in views.items():
            tensors[name].data = view

    def _gather_embedding(self) -> None:
        """The first table is the embedding, or both."""
        for table in self._tables[:1]:
            blocks = [
                index
                for piece in table.pieces
                for index, block in enumerate(self._blocks)
                if block.units[0].module is piece
            ]
            table.gather_from([view for b in blocks for view in self._pool.owner_views(b).values()])

    def _units(self) -> list[tuple[int, Unit]]:
        """All units with their blocks, in the order of the forward pass."""
        return [
            (index, unit)
            for index, block in enumerate(self._blocks)
            for unit in block.units
            if block.is_fetched
        ]


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype
