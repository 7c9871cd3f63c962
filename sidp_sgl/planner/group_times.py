"""Time of a step in a SiDP group: fetches, WaS, CaS, and the threshold between them.

Where ranks differ (layers need not divide evenly), it is the slowest one's. All times in seconds.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from sidp_sgl.config import ALL
from sidp_sgl.planner.prefetch_factor import Prefetch, was_factor
from sidp_sgl.planner.time_model import RankTimes, Work
from sidp_sgl.planner.weights import block_bytes, pools_attention, table_pieces, units
from sidp_sgl.scheduler.modes.policy import AUTO, CAS, WAS
from sidp_sgl.scheduler.modes.times import streams
from sidp_sgl.weightpool.cas.staging import Staging, make_staging
from sidp_sgl.weightpool.placement import DEFAULT_SLOTS, EXPERT_SLOTS, Placement


@dataclass(frozen=True)
class Pooling:
    """How the group pools; the same words as the flags. `order` and `turns` of the fetches are the
    engine's own, but where others are compared with it."""

    num_ranks: int
    pool: str = "ffn"
    placement: str = "interleaved"
    slots: int | None = None  # the default
    order: str = "sequential"
    turns: bool = True


@dataclass(frozen=True)
class GroupTimes:
    """Steps of the ranks of one group, all with the same batch."""

    rank: RankTimes
    pooling: Pooling

    @cached_property
    def blocks(self) -> list[int]:
        """Bytes of every layer's block on one GPU."""
        shape, split = self.rank.shape, self.rank.split
        kinds = {
            shape.is_moe(layer): block_bytes(shape, layer, split, self.pooling.pool)
            for layer in shape.layer_kinds()
        }
        return [kinds[shape.is_moe(layer)] for layer in range(shape.num_layers)]

    @cached_property
    def tables(self) -> tuple[list[int], list[int]]:
        """Bytes of the blocks of embedding and LM head, where they are pooled."""
        if self.pooling.pool != ALL:
            return [], []
        return table_pieces(self.rank.shape, self.rank.split, max(self.blocks))

    @cached_property
    def placement(self) -> Placement:
        """Of the layers' blocks, and then the tables'."""
        pooling = self.pooling
        default = EXPERT_SLOTS if self.rank.shape.num_experts > 1 else DEFAULT_SLOTS
        slots = pooling.slots or default
        placement = Placement.of(self.blocks, pooling.num_ranks, slots, pooling.placement)
        for pieces, is_fetched in zip(self.tables, (False, True), strict=True):
            for size in pieces:
                placement = placement.with_block(size, None, is_fetched=is_fetched)
        return placement

    @cached_property
    def staging(self) -> Staging:
        """Rows that others lease of a rank, and results on their way back."""
        shape, split, pool = self.rank.shape, self.rank.split, self.pooling.pool
        kinds = shape.layer_kinds()
        sizes = [unit.row_bytes for layer in kinds for unit in units(shape, layer, split, pool)]
        row = 2 * shape.hidden_size
        sizes += [(row, 2 * size // row) for size in self.tables[1]]
        return make_staging(sizes, self.pooling.num_ranks, block_bytes=max(self.blocks))

    def block_seconds(self, block: int) -> float:
        """One fetch, at the full rate of the owner's link; none of what is read where it lies."""
        machine, placement = self.rank.machine, self.placement
        if block in placement.unfetched:
            return 0.0
        return machine.copy_seconds + placement.block_bytes(block) / machine.link_bandwidth

    @cached_property
    def fetch_seconds(self) -> float:
        """All fetches of a step: what a rank takes in, or an owner gives out to all others."""
        placement = self.placement
        ranks = range(placement.num_ranks)
        if all(map(placement.keeps_all, ranks)):
            return 0.0
        own = [sum(map(self.block_seconds, placement.owned(rank))) for rank in ranks]
        return max(sum(own) - min(own), (placement.num_ranks - 1) * max(own))

    @cached_property
    def _prefetch(self) -> Prefetch:
        pooling, placement = self.pooling, self.placement
        slots = max(map(placement.slots, range(placement.num_ranks)))
        return Prefetch(
            placement.num_ranks,
            len(self.blocks),
            slots,
            pooling.order,
            pooling.turns,
            pooling.placement,
        )

    def was_seconds(self, work: Work) -> float:
        """A step that streams weights: its compute or its fetches, and what the order costs."""
        return self.streamed_seconds(self.rank.compute_seconds(work))

    def streamed_seconds(self, compute: float) -> float:
        """A step of `compute` seconds that streams weights meanwhile."""
        compute = self._beside_fetches(compute)
        return compute * was_factor(self._prefetch, self.fetch_seconds / compute)

    def _beside_fetches(self, compute: float) -> float:
        """While a fetch is under way it takes a share of the compute: all the time, or as long as
        the fetches of a step last."""
        share = self.rank.machine.copy_share
        return min(compute / (1 - share), compute + share * self.fetch_seconds)

    def cas_seconds(self, work: Work, active_ranks: float | None = None) -> float:
        """A decode step that sends rows: `active_ranks` do the same step, the others are idle.

        Rows of all active ranks meet in one GEMM at the owner, and share its link. Where batches
        differ, `active_ranks` is all their rows over this rank's.
        """
        active = self.pooling.num_ranks if active_ranks is None else active_ranks
        placement = self.placement
        fetchable = len(placement.blocks) - len(placement.unfetched)
        remote_share = placement.most_slots / fetchable
        layers = sum(
            count * self._cas_layer_seconds(layer, work, active, remote_share)
            for layer, count in self.rank.shape.layer_kinds().items()
        )
        return (
            layers
            + self.rank.head_seconds(work)
            + self._sent_head_seconds(active * work.sampled, remote_share)
        )

    def _sent_head_seconds(self, all_rows: float, remote_share: float) -> float:
        """The way of the head's rows and logits, where its pieces are others'. Its compute is the
        same as here: all rows at once, and less of the table."""
        machine, row = self.rank.machine, 2 * self.rank.shape.hidden_size
        bandwidth = machine.row_bandwidth or machine.link_bandwidth
        return remote_share * sum(
            machine.round_trip_seconds + all_rows * (row + 2 * size / row) / bandwidth
            for size in self.tables[1]
        )

    def _cas_layer_seconds(
        self, layer: int, work: Work, active: float, remote_share: float
    ) -> float:
        rank, all_rows, pool = self.rank, active * work.rows, self.pooling.pool
        sent = units(rank.shape, layer, rank.split, pool)
        row_bytes = sum(sum(unit.payload) + unit.result for unit in sent)
        machine = rank.machine
        bandwidth = machine.row_bandwidth or machine.link_bandwidth
        return (
            rank.projection_seconds(
                layer, all_rows if pools_attention(rank.shape, pool) else work.rows
            )
            + rank.attention_seconds(work)
            + rank.request_seconds(work)
            + rank.other_seconds(work.rows)
            + rank.router_seconds(layer, work.rows)
            + rank.ffn_seconds(layer, all_rows)
            + rank.ffn_collective_seconds(all_rows)
            + remote_share * len(sent) * machine.round_trip_seconds
            + remote_share * all_rows * row_bytes / bandwidth
        )

    def hiding_batch(self, context: float, max_batch: int) -> int:
        """The smallest batch whose compute hides the fetches; `max_batch` + 1 where none does."""

        def hides(batch: int) -> bool:
            return self.rank.compute_seconds(Work.decode(batch, context)) >= self.fetch_seconds

        return _first(hides, max_batch)

    def threshold(self, context: float, max_batch: int) -> int:
        """The batch from which `--sidp-mode auto` streams, by the engine's own rule. Batches that
        are too large to be sent always do: there, the one from which the fetches are hidden."""

        def is_streamed(batch: int) -> bool:
            work = Work.decode(batch, context)
            was = self._beside_fetches(self.rank.compute_seconds(work))
            cas = self.cas_seconds(work)
            return streams(self.fetch_seconds, was, cas)

        sent = min(max_batch, self.staging.rows_per_rank)
        threshold = _first(is_streamed, sent)
        return (
            threshold
            if threshold <= sent
            else max(threshold, self.hiding_batch(context, max_batch))
        )

    def runs(self, mode: str, batch: int, threshold: int) -> str:
        """What a step of `batch` is in `--sidp-mode` `mode`, in the long run."""
        can_send = batch <= self.staging.rows_per_rank
        wants_cas = mode == CAS or (mode == AUTO and batch < threshold)
        return CAS if can_send and wants_cas else WAS

    def largest_sent(self, threshold: int, fitting: int) -> int:
        """The largest batch up to `fitting` that `--sidp-mode auto` sends; may be 0."""
        return min(fitting, self.staging.rows_per_rank, threshold - 1)

    def decode_seconds(self, mode: str, batch: int, context: float, threshold: int) -> float:
        """A decode step in `--sidp-mode` `mode`."""
        work = Work.decode(batch, context)
        if self.runs(mode, batch, threshold) == WAS:
            return self.was_seconds(work)
        return self.cas_seconds(work)


def _first(holds: Callable[[int], bool], max_batch: int) -> int:
    """The smallest batch size for which `holds`, which also does for all larger ones;
    `max_batch` + 1 where it does for none."""
    return 1 + bisect_left(range(1, max_batch + 1), True, key=holds)
