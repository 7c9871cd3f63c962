"""Composition root of one process: what SiDP sets up in each of SGLang's roles, in reading order.

Nothing happens without --sidp, but for the flags and, on machines without an accelerator, the CPU
platform's own hooks.
"""

import threading
from dataclasses import asdict
from typing import Any

from sglang.srt.arg_groups.overrides import model_config_of
from sglang.srt.platforms import current_platform
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_device, get_exec, get_parallel
from tqdm import tqdm

from sidp_sgl import __version__
from sidp_sgl.config import SidpConfig
from sidp_sgl.scheduler.lifecycle.rendezvous import Offer, exchange
from sidp_sgl.scheduler.rank_control import RankControl
from sidp_sgl.sglang_hooks import arguments, refusals, required
from sidp_sgl.sglang_hooks.cpu import memory as cpu_memory
from sidp_sgl.sglang_hooks.cuda import colocation
from sidp_sgl.sglang_hooks.cuda import defaults as cuda_defaults
from sidp_sgl.sglang_hooks.cuda.graphs import GraphHooks
from sidp_sgl.sglang_hooks.dispatch.controller import ControllerDispatch
from sidp_sgl.sglang_hooks.dispatch.waiting import WaitingRequests
from sidp_sgl.sglang_hooks.failures import engine as failures
from sidp_sgl.sglang_hooks.failures import reports, sockets
from sidp_sgl.sglang_hooks.model.checkpoint import CheckpointReader
from sidp_sgl.sglang_hooks.model.offloader import PoolOffloader
from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.sglang_hooks.status.metrics import MetricsHooks
from sidp_sgl.sglang_hooks.status.status import StatusHooks
from sidp_sgl.sglang_hooks.status.updates import UpdateHooks
from sidp_sgl.sglang_hooks.step.modes import ModeHooks
from sidp_sgl.weightpool.cas.compute_group import ComputeGroup, no_counters
from sidp_sgl.weightpool.cas.staging import ROWS_PER_RANK, capacity_rows, make_staging
from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.execution import UnitExecution
from sidp_sgl.weightpool.placement import owners
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.schedule import default_slots
from sidp_sgl.weightpool.transport.devices import make_calls, make_transport

CPU_PLATFORM = "sidp_cpu"


def register() -> None:
    """Every process, before argument parsing."""
    required.apply(arguments.HOOKS)
    arguments.install_keywords()
    cuda_defaults.install()
    refusals.install()
    failures.install()
    required.apply([Hook("sglang.srt.runtime_context.publish", _on_publish, HookType.AFTER)])
    if current_platform.device_name == CPU_PLATFORM:
        from sidp_sgl.sglang_hooks.cpu import controller as cpu_controller

        required.apply(cpu_controller.MEMORY_HOOKS)


def _on_publish(_: Any, server_args: Any, *, role: str, **__: Any) -> None:
    """The per-process bootstrap: SGLang has just published the process's configuration."""
    config = arguments.config_of(server_args)
    if role == "dp_controller" and current_platform.device_name == CPU_PLATFORM:
        from sidp_sgl.sglang_hooks.cpu import controller as cpu_controller

        required.apply(cpu_controller.CONTROLLER_HOOKS)
    if role == "scheduler":
        # tqdm's own lock is a named semaphore, which may outlive a process that is killed.
        tqdm.set_lock(threading.RLock())
    if config is None:
        return
    required.apply(sockets.HOOKS)
    if role == "tokenizer":
        required.apply(refusals.runtime_hooks())
    if role == "detokenizer":
        reports.join(config.group)
    if role == "dp_controller":
        if config.sidp_colocate:
            required.apply(colocation.CONTROLLER_HOOKS)
        controller = reports.ControllerReports(config.group, keeps_states=not config.own_dispatch)
        required.apply(controller.hooks())
        if config.own_dispatch:
            dispatch = ControllerDispatch(config.group, server_args.dp_size)
            required.apply([dispatch.hook()])
    if role == "scheduler":
        rank_reports = reports.RankReports(config.group, get_parallel().dp_rank)
        with rank_reports.errors():
            rank = Rank(server_args, config)
            rank.start()
            required.apply(rank_reports.hooks(lambda: rank.pool.is_started))


class Rank:
    """One DP scheduler process with --sidp: group → control plane → pool → modes → hooks."""

    def __init__(self, server_args: Any, config: SidpConfig) -> None:
        parallel = get_parallel()
        self.config = config
        self.dp_rank = parallel.dp_rank
        self.dp_size = parallel.dp_size
        # As resolved: the arguments themselves stay as the user gave them.
        self.device = get_device().device
        has_graphs = get_exec().graph.cuda_graph_config.decode.backend != "disabled"
        # Units are captured before SGLang replaces its GEMMs by batch-invariant ones.
        self.graphs = has_graphs and not get_exec().deterministic.enable_deterministic_inference
        self.model_config = model_config_of(server_args)
        layer_owners = owners(
            self.model_config.num_hidden_layers, self.dp_size, config.sidp_placement
        )
        order = config.sidp_prefetch_order
        rate = None if config.sidp_link_gbps is None else config.sidp_link_gbps * 1e9
        self.pool = WeightPool(
            transport=make_transport(self.device, rate),
            rank=self.dp_rank,
            num_ranks=self.dp_size,
            owners=layer_owners,
            prefetch_order=order,
            num_slots=config.sidp_cache_slots or default_slots(layer_owners, self.dp_size, order),
        )
        self.control = RankControl(
            config,
            self.dp_rank,
            self.dp_size,
            layer_owners,
            config.group,
            capacity_rows(self.dp_size),
            ROWS_PER_RANK,
        )
        self.cas: ComputeGroup | None = None
        self.execution = UnitExecution(self.pool)
        self.offloader = PoolOffloader(self.pool, config.sidp_pool, self._meet_peers)
        self.reader = CheckpointReader(self.offloader.is_placeholder)
        self.waiting = WaitingRequests(self.dp_rank, self.control.thread, config.group)
        self.modes = ModeHooks(
            self.control, self.pool, self.execution, lambda: self.waiting.received
        )

    def start(self) -> None:
        self.control.start()
        status = StatusHooks(self.status)
        required.apply(
            [
                self.offloader.hook(),
                *self.reader.hooks(),
                self.waiting.hook(),
                *self.modes.hooks(),
                *status.hooks(),
                *MetricsHooks(status.status_of).hooks(),
                *UpdateHooks(self.config, self.control.modes).hooks(),
            ]
        )
        if self.config.sidp_colocate:
            colocation.divide_memory(self.dp_size, lambda: self.pool.transport.shared_bytes)
        if self.device == "cuda":
            required.apply(GraphHooks(self.pool, self.execution).hooks())

    def _meet_peers(self, units: list[PooledUnit]) -> UnitExecution:
        """While loading: connect what this rank has with what the others have."""
        descriptors = self.pool.transport.export()
        num_pool = len(descriptors)
        if self.config.sidp_mode != "was":
            self.cas = self._compute_group(units)
            descriptors = descriptors + self.cas.calls.export()
        own = Offer(self.dp_rank, self.fingerprint(), self.pool.offer(), descriptors)
        for rank, offer in exchange(self.config.group, own, self.dp_size).items():
            theirs = offer.file_descriptors
            self.pool.connect(rank, offer.content, theirs[:num_pool])
            if self.cas is not None:
                self.cas.calls.connect(rank, theirs[num_pool:])
        if self.cas is not None:
            self.cas.service.start()
            self.execution.remote = self.cas.remote
        return self.execution

    def _compute_group(self, units: list[PooledUnit]) -> ComputeGroup:
        staging = make_staging((unit.row_bytes for unit in units), self.dp_size)
        calls = make_calls(self.pool.transport, self.dp_rank, self.dp_size, staging, self.graphs)
        owned = [unit for unit in units if self.pool.owns(unit.layer)]
        return ComputeGroup(calls, staging, owned, self.control.share.add)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal on all ranks of a group."""
        return {
            "sidp_sgl version": __version__,
            "config": self.config.as_dict(),
            "model": self.model_config.hf_config.to_json_string(),
            "dtype": str(self.model_config.dtype),
            "owners": list(self.pool.owners),
        }

    def status(self) -> dict[str, Any]:
        """The pool's and the modes' part of the `sidp` dictionary; sizes in bytes."""
        pool = self.pool
        sizes = pool.bytes()
        return {
            "enabled": True,
            "dp_rank": self.dp_rank,
            "dp_size": self.dp_size,
            "pool": self.config.sidp_pool,
            "placement": self.config.sidp_placement,
            "prefetch_order": self.config.sidp_prefetch_order,
            "owned_layers": [layer for layer in range(len(pool.owners)) if pool.owns(layer)],
            "pooled_bytes": sizes.pooled_bytes,
            "owned_bytes": sizes.owned_bytes,
            "replicated_bytes": cpu_memory.replicated_bytes(),
            "cache_slots": len(pool.prefetcher.slots),
            "cache_bytes": sizes.cache_bytes,
            "staging_bytes": self.execution.staging_bytes,
            "checkpoint_bytes_read": self.reader.bytes_read,
            "placeholders_unmaterialised": self.offloader.unmaterialised,
            **self.control.status(),
            "dispatch": self.control.dispatch_status(),
            "was": asdict(pool.prefetcher.counters),
            "cas": {
                **self.control.cas_counters(),
                **(self.cas.counters() if self.cas is not None else no_counters()),
            },
        }
