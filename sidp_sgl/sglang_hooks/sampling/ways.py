"""How the TP ranks sample a step, decided from what the batch asks for: the same on all of them."""

from dataclasses import dataclass

ARGMAX, SPLIT, GATHERED = WAYS = ("argmax", "split", "gathered")
_SHARDED_MODES = ("DECODE", "EXTEND", "MIXED")  # names of SGLang's ForwardMode


@dataclass(frozen=True)
class Needs:
    """What a batch asks of the sampler, in values that the host knows."""

    all_greedy: bool  # every row takes its most probable token
    logprobs: bool  # of the sampled tokens
    edits_logits: bool  # a grammar, bias or penalty on some row
    whole_batch: bool  # what SGLang does over all rows at once


def way_of(needs: Needs) -> str:
    """ARGMAX: every rank gives the maximum of its part of the vocabulary. SPLIT: every rank samples
    its share of the rows. GATHERED: every rank samples all rows, as SGLang does.

    >>> way_of(Needs(all_greedy=True, logprobs=True, edits_logits=False, whole_batch=False))
    'split'
    """
    if needs.whole_batch:
        return GATHERED
    if needs.all_greedy and not (needs.logprobs or needs.edits_logits):
        return ARGMAX
    return SPLIT


def leaves_shard(forward_mode: str, input_logprobs: bool, prefill_only: bool) -> bool:
    """Whether a forward pass leaves a rank's part of the logits as it is, for the sampler: other
    than that, only passes of their own (scores, drafts) read logits, and read whole rows."""
    return forward_mode in _SHARDED_MODES and not (input_logprobs or prefill_only)


def rows_per_rank(num_rows: int, tp_size: int) -> int:
    """
    >>> rows_per_rank(5, 2)
    3
    """
    return -(-num_rows // tp_size)


def share(num_rows: int, tp_rank: int, tp_size: int) -> slice:
    """Rows that a rank samples; may be none.

    >>> share(5, 1, 2)
    slice(3, 5, None)
    """
    rows = rows_per_rank(num_rows, tp_size)
    return slice(min(tp_rank * rows, num_rows), min((tp_rank + 1) * rows, num_rows))
