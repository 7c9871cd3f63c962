"""Composition root of one process: what SiDP sets up in each of SGLang's roles, in reading order.

Nothing happens without --sidp, but for the flags, sequence-parallel sampling where --sidp-sampling
asks for it and, on machines without an accelerator, the CPU platform's own hooks.
"""

import threading
from dataclasses import asdict
from typing import Any

from msgspec import structs
from sglang.srt.arg_groups.overrides import model_config_of
from sglang.srt.platforms import current_platform
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_device, get_exec, get_observability, get_parallel
from tqdm import tqdm

from sidp_sgl import __version__
from sidp_sgl.config import FULL, OFF, OWN_DISPATCH, SEQUENCE_PARALLEL, SidpConfig
from sidp_sgl.scheduler.control_plane import ControlPlane
from sidp_sgl.scheduler.lifecycle.liveness import tie
from sidp_sgl.scheduler.lifecycle.rendezvous import Offer, exchange
from sidp_sgl.scheduler.member import Member
from sidp_sgl.scheduler.modes.service_share import ServiceShare
from sidp_sgl.scheduler.status import (
    CasStatus,
    DispatchStatus,
    ResidencyStatus,
    SelfCheckStatus,
    Status,
    StepsStatus,
    WasStatus,
)
from sidp_sgl.sglang_hooks import arguments, profiling, refusals, request_checks, required
from sidp_sgl.sglang_hooks.controller import controller_hooks
from sidp_sgl.sglang_hooks.cpu import memory as cpu_memory
from sidp_sgl.sglang_hooks.cpu.platform import MEMORY_HOOK, SidpCpuPlatform
from sidp_sgl.sglang_hooks.cuda import colocation, gpus
from sidp_sgl.sglang_hooks.cuda import defaults as cuda_defaults
from sidp_sgl.sglang_hooks.cuda import process as cuda_process
from sidp_sgl.sglang_hooks.cuda.graphs import GraphHooks
from sidp_sgl.sglang_hooks.dispatch.waiting import WaitingRequests
from sidp_sgl.sglang_hooks.failures import engine as failures
from sidp_sgl.sglang_hooks.failures import reports, sockets
from sidp_sgl.sglang_hooks.model.checkpoint import CheckpointReader
from sidp_sgl.sglang_hooks.model.offloader import PoolOffloader
from sidp_sgl.sglang_hooks.model.slots import num_slots
from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.sglang_hooks.residency.lender import KvLender, Lent
from sidp_sgl.sglang_hooks.sampling import conditions as sampling_conditions
from sidp_sgl.sglang_hooks.sampling.hooks import SequenceParallelSampling
from sidp_sgl.sglang_hooks.scheduler import SchedulerHooks
from sidp_sgl.sglang_hooks.status.members import Members
from sidp_sgl.sglang_hooks.status.metrics import Metrics
from sidp_sgl.sglang_hooks.status.server_info import ServerInfo, follower_hook
from sidp_sgl.sglang_hooks.status.updates import UpdateHooks
from sidp_sgl.sglang_hooks.step.rank_steps import FollowerSteps, RankSteps
from sidp_sgl.sglang_hooks.step.shared_mode import SharedMode
from sidp_sgl.weightpool.cas.endpoint import CasEndpoint, no_counters
from sidp_sgl.weightpool.cas.staging import make_staging
from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.execution import UnitExecution
from sidp_sgl.weightpool.placement import Placement
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.self_check.check import SelfCheck
from sidp_sgl.weightpool.transport.devices import make_mailbox, make_transport


def register() -> None:
    """Every process, before argument parsing."""
    required.apply(arguments.HOOKS)
    arguments.install_keywords()
    cuda_defaults.install()
    refusals.install()
    sampling_conditions.install()
    failures.install()
    required.apply([Hook("sglang.srt.runtime_context.publish", _on_publish, HookType.AFTER)])
    if current_platform.device_name == SidpCpuPlatform.device_name:
        required.apply([MEMORY_HOOK])


def _on_publish(_: Any, server_args: Any, *, role: str, **__: Any) -> None:
    """The per-process bootstrap: SGLang has just published the process's configuration."""
    config = arguments.config_of(server_args)
    if role == "dp_controller":
        required.apply(controller_hooks(config, server_args.dp_size))
    if role == "scheduler":
        # tqdm's own lock is a named semaphore, which may outlive a process that is killed.
        tqdm.set_lock(threading.RLock())
        if current_platform.device_name == SidpCpuPlatform.device_name:
            _complete_cpu_models()
        if arguments.sampling_of(server_args) == SEQUENCE_PARALLEL:
            required.apply(SequenceParallelSampling().hooks())
    if config is None:
        return
    sockets.hide_names()
    if role == "tokenizer":
        required.apply([*refusals.runtime_hooks(), *request_checks.HOOKS, *profiling.HOOKS])
    if role == "detokenizer":
        tie(config.engine)
    if role == "scheduler":
        parallel = get_parallel()
        member = Member(parallel.dp_rank, parallel.tp_rank, parallel.tp_size)
        rank_reports = reports.RankReports(config.engine, member)
        with rank_reports.errors():
            Rank(server_args, config, member, rank_reports).start()


def _complete_cpu_models() -> None:
    from sidp_sgl.sglang_hooks.cpu import models, quantised  # import SGLang's models

    required.apply([*models.HOOKS, *quantised.HOOKS])
    models.register_mla()


class Rank:
    """One scheduler process with --sidp: group → control plane → pool → modes → hooks."""

    def __init__(
        self,
        server_args: Any,
        config: SidpConfig,
        member: Member,
        rank_reports: reports.RankReports,
    ) -> None:
        self.config = config
        self.member = member
        self.reports = rank_reports
        self.dp_rank, self.dp_size = member.dp_rank, get_parallel().dp_size
        # As resolved: the arguments themselves stay as the user gave them.
        self.device = get_device().device
        has_graphs = get_exec().graph.cuda_graph_config.decode.backend != "disabled"
        # Units are captured before SGLang replaces its GEMMs by batch-invariant ones.
        self.graphs = has_graphs and not get_exec().deterministic.enable_deterministic_inference
        self.model_config = model_config_of(server_args)
        placement = Placement(
            self.dp_size,
            num_slots(config, self.model_config.hf_text_config),
            config.sidp_placement,
            self.model_config.num_hidden_layers,
        )
        rate = None if config.sidp_link_gbps is None else config.sidp_link_gbps * 1e9
        self.pool = WeightPool(
            make_transport(self.device, rate),
            self.dp_rank,
            placement,
            has_checksums=config.sidp_self_check != OFF,
        )
        self.self_check = SelfCheck(
            self.pool,
            at_start=config.sidp_self_check != OFF,
            while_running=config.sidp_self_check == FULL,
            captures=self.device == "cuda" and has_graphs,
            meet=self._meet_checked_peers,
        )
        self.service_share = ServiceShare()
        self.control: ControlPlane | None = None  # on TP rank 0
        if member.tp_rank == 0:
            self.control = ControlPlane(
                config,
                self.dp_rank,
                self.dp_size,
                config.engine,
                self.service_share,
            )
        self.cas: CasEndpoint | None = None
        self.cas_counters = no_counters
        self.execution = UnitExecution(self.pool)
        self.offloader = PoolOffloader(
            self.pool,
            config.sidp_pool,
            self._meet_peers,
            loads_in_place=not self.model_config.quantization,
        )
        self.reader = CheckpointReader(self.offloader.is_placeholder, self.offloader.before_loading)
        controller = None if self.control is None else self.control.controller
        self.waiting = WaitingRequests(self.dp_rank, controller, config.engine)
        self.lender: KvLender | None = None
        if config.has_residency and self.pool.transport.page_bytes is not None:
            is_lru = server_args.radix_eviction_policy == "lru"
            self.lender = KvLender(self.pool, evicts=is_lru and member.tp_size == 1)
        has_metrics = self.control is not None and get_observability().enable_metrics
        metrics = Metrics(self.status) if has_metrics else None
        self.hooks = SchedulerHooks(
            self.reports,
            self.pool,
            self.waiting,
            self._steps(),
            self.self_check,
            self._say,
            metrics,
            self.lender,
        )

    def _steps(self) -> RankSteps | FollowerSteps:
        shared = SharedMode()
        if self.control is None:
            return FollowerSteps(self.pool, self.execution, shared.receive)
        steps = RankSteps(self.control, self.pool, self.execution, lambda: self.waiting.received)
        if self.member.tp_size > 1:
            steps.share = shared.send
        return steps

    def _say(self) -> None:
        if self.device == "cuda":
            is_paced = self.config.sidp_colocate or self.config.sidp_link_gbps is not None
            gpus.say(self.member, None if is_paced else self.self_check.fetch_rate)

    def start(self) -> None:
        required.apply([*self.offloader.hooks(), *self.reader.hooks(), *self.hooks.hooks()])
        turn_residency = None
        if self.lender is not None:
            required.apply(self.lender.hooks())
            turn_residency = self._turn_residency
        members = Members(self.figures)
        if self.control is None:
            required.apply([follower_hook(members.gather)])
        else:
            self.control.start()
            required.apply(ServerInfo(self.status, members.gather).hooks())
        set_threshold = self.control.modes.set_threshold if self.control else lambda _: None
        required.apply(UpdateHooks(self.config, set_threshold, turn_residency).hooks())
        if self.config.sidp_colocate:
            colocation.divide_memory(self.dp_size, lambda: self.pool.transport.shared_bytes)
        if self.device == "cuda":
            cuda_process.set_up()
            required.apply(GraphHooks(self.pool, self.execution).hooks())

    def _turn_residency(self, on: bool) -> None:
        assert self.lender is not None
        self.lender.turn(on=on, scheduler=self.hooks.scheduler)

    def _meet_peers(self, units: list[PooledUnit]) -> UnitExecution:
        """While loading: connect what this rank has with what the others have."""
        descriptors = self.pool.transport.export()
        num_pool = len(descriptors)
        if self.config.sidp_mode != "was":
            self.cas = self._cas_endpoint(units)
            self.cas_counters = self.cas.counters
            descriptors = descriptors + self.cas.mailbox.export()
            if self.control is not None:
                self.control.modes.leases.need(self.pool.placement.asked(self.dp_rank))
                self.control.allow(self.cas.requester.staging.rows_per_rank)
        own = Offer(self.member, self.fingerprint(), self.pool.offer(), descriptors)
        for rank, offer in exchange(self.config.engine, own, self.dp_size).items():
            theirs = offer.file_descriptors
            self.pool.connect(rank, offer.content, theirs[:num_pool])
            if self.cas is not None:
                self.cas.mailbox.connect(rank, theirs[num_pool:])
        if self.cas is not None:
            self.cas.service.start()
            self.execution.requester = self.cas.requester
            self.self_check.add_calls(self.cas.requester, units)
        return self.execution

    def _meet_checked_peers(self) -> None:
        """No member of the group is starting any more."""
        own = Offer(self.member, {}, {}, [])
        exchange(f"{self.config.engine}-checked", own, self.dp_size)

    def _cas_endpoint(self, units: list[PooledUnit]) -> CasEndpoint:
        placement = self.pool.placement
        staging = make_staging(
            (unit.row_bytes for unit in units),
            self.dp_size,
            placement.num_stripes,
            max(map(placement.block_bytes, range(len(placement.blocks))), default=0),
        )
        transport = self.pool.transport
        mailbox = make_mailbox(transport, self.dp_rank, staging, self.graphs)
        owned = [unit for unit in units if self.pool.owns(unit.block)]
        return CasEndpoint(mailbox, staging, owned, self.service_share.add, self.reports.give_up)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal on all ranks of a group."""
        return {
            "sidp_sgl version": __version__,
            "config": self.config.as_dict(),
            "model": self.model_config.hf_config.to_json_string(),
            "dtype": str(self.model_config.dtype),
            "owners": [list(self.pool.owners(b)) for b in range(len(self.pool.placement.blocks))],
        }

    def figures(self) -> dict[str, Any]:
        """What this process has fetched, sent and served."""
        return {
            "tp_rank": self.member.tp_rank,
            "owned_bytes": self.pool.placement.owned_bytes(self.dp_rank),
            "was": asdict(self.pool.prefetcher.counters),
            "cas": self.cas_counters(),
            "self_check": asdict(self.self_check.coverage),
        }

    def status(self) -> Status:
        """What TP rank 0 says of its rank, once its scheduler is made."""
        config, pool, scheduler = self.config, self.pool, self.hooks.scheduler
        placement, kv = pool.placement, scheduler.pool_stats_observer.get_pool_stats()
        control = self.control
        assert control is not None
        modes = control.modes
        return Status(
            enabled=True,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            tp_rank=self.member.tp_rank,
            tp_size=self.member.tp_size,
            pool=config.sidp_pool,
            placement=config.sidp_placement,
            owned_layers=self.offloader.owned_layers(),
            pooled_bytes=placement.pooled_bytes,
            owned_bytes=placement.owned_bytes(self.dp_rank),
            replicated_bytes=cpu_memory.replicated_bytes(),
            cache_slots=placement.slots(self.dp_rank),
            cache_bytes=placement.cache_bytes(self.dp_rank),
            staging_bytes=self.execution.staging_bytes,
            checkpoint_bytes_read=self.reader.bytes_read,
            placeholders_unmaterialised=self.offloader.unmaterialised,
            kv_capacity_tokens=int(scheduler.max_total_num_tokens),
            kv_headroom_tokens=int(kv.full_available_size + kv.full_evictable_size),
            running_batch_size=len(scheduler.running_batch.reqs),
            waiting_requests=len(scheduler.waiting_queue),
            dispatch=DispatchStatus(
                method=OWN_DISPATCH if config.own_dispatch else "sglang",
                **structs.asdict(control.controller.update),
            ),
            mode=modes.mode,
            batch_threshold=modes.threshold,
            mode_switches=modes.policy.switches,
            mode_switch_reasons=dict(modes.policy.reasons),
            self_check=SelfCheckStatus(
                level=config.sidp_self_check, **asdict(self.self_check.coverage)
            ),
            was=WasStatus(**asdict(pool.prefetcher.counters)),
            residency=ResidencyStatus(**asdict(self.lender.lent if self.lender else Lent())),
            iterations=StepsStatus(**modes.steps),
            cas=CasStatus(**control.cas_figures(), **self.cas_counters()),
        )
