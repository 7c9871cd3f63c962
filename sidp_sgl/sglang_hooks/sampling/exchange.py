"""What TP ranks exchange to sample together: whole rows of logits, or what they found in theirs.

A shard is a rank's part of the logits, [rows, width] in any floating type; the ranks' parts side by
side, cut at the vocabulary, are the rows. Collectives run in the order of the calls, which is the
same on all ranks; in the type of the shard, which is half the bytes where that is BF16.
"""

import torch
import torch.distributed as dist

from sidp_sgl.sglang_hooks.sampling.ways import rows_per_rank


def gather_rows(shard: torch.Tensor, vocab_size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All rows whole, on every rank: [rows, vocab_size], fp32, contiguous."""
    size, (num_rows, width) = group.size(), shard.shape
    parts = shard.new_empty(size * num_rows, width)
    dist.all_gather_single(parts, shard.contiguous(), group=group)
    return _side_by_side(parts.view(size, num_rows, width), vocab_size)


def exchange_rows(shard: torch.Tensor, vocab_size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's share of the rows whole: [rows_per_rank, vocab_size], fp32, contiguous; rows
    beyond the batch, which make the shares even, are zero."""
    size, (num_rows, width) = group.size(), shard.shape
    rows = rows_per_rank(num_rows, size)
    padded = shard.contiguous()
    if rows * size > num_rows:
        padded = torch.nn.functional.pad(shard, (0, 0, 0, rows * size - num_rows))
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded, group=group)
    return _side_by_side(parts.view(size, rows, width), vocab_size)


def greedy(shard: torch.Tensor, vocab_size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Most probable token of every row, the lowest of equal ones: [rows], int64."""
    num_rows, width = shard.shape
    first = group.rank() * width
    mine = shard[:, : max(0, vocab_size - first)]
    if mine.shape[1]:
        ids = mine.argmax(dim=-1, keepdim=True)  # of equal ones the first; max's may be any
        values = mine.gather(1, ids)
    else:  # nothing but padding
        ids = torch.zeros(num_rows, 1, dtype=torch.int64, device=shard.device)
        values = shard.new_full((num_rows, 1), -torch.inf)
    # One message: fp64 holds either exactly.
    pairs = torch.cat([values.double(), (ids + first).double()], dim=1)
    found = _gather(pairs, group).view(group.size(), num_rows, 2)
    best = found[..., 0].argmax(dim=0, keepdim=True)
    return found[..., 1].gather(0, best).squeeze(0).long()


def gather_results(
    ids: torch.Tensor, logprobs: torch.Tensor | None, num_rows: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of all rows, from what each rank sampled of its share (`ids`: [its rows]): int64, and fp32 or
    None."""
    rows = rows_per_rank(num_rows, group.size())
    results = torch.zeros(rows, 2, dtype=torch.float64, device=ids.device)
    results[: len(ids), 0] = ids.double()
    if logprobs is not None:
        results[: len(ids), 1] = logprobs.double()
    every = _gather(results, group)[:num_rows]
    return every[:, 0].long(), None if logprobs is None else every[:, 1].to(logprobs.dtype)


def share_first_rank_s(ids: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Overwrite `ids` by those of the first rank."""
    dist.broadcast(ids, group=group, group_src=0)


def _gather(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The ranks' parts, one below the other."""
    every = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    dist.all_gather_single(every, part.contiguous(), group=group)
    return every


def _side_by_side(parts: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[ranks, rows, width] → [rows, vocab_size] in fp32."""
    size, rows, width = parts.shape
    whole = torch.empty(rows, size, width, dtype=torch.float32, device=parts.device)
    whole.copy_(parts.transpose(0, 1))
    return whole.view(rows, size * width)[:, :vocab_size].contiguous()
