"""Where the ranks of a group meet: offers and descriptors both ways, differences, absence."""

import gc
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from sidp_sgl.scheduler.lifecycle.rendezvous import Offer, RendezvousError, compare, exchange
from sidp_sgl.scheduler.member import Member, members


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def memory_of(rank: int) -> int:
    """A descriptor whose content tells whose it is."""
    fd = os.memfd_create(f"rank{rank}")
    os.write(fd, b"memory of rank %d" % rank)
    return fd


def meet(
    ranks: list[int],
    num_ranks: int,
    fingerprint: Callable[[int], dict[str, Any]] = lambda rank: {"version": 1},
    timeout: float = 20.0,
) -> dict[int, dict[int, Offer] | Exception]:
    """What `exchange` returned or raised in each of `ranks`, as threads."""
    group, results = uuid.uuid4().hex, {}

    def run(rank: int) -> None:
        own = [memory_of(rank), memory_of(rank)]
        content = {"blocks": "x" * 300_000, "rank": rank}  # more than a socket's buffer
        offer = Offer(Member(rank), fingerprint(rank), content, own)
        try:
            results[rank] = exchange(group, offer, num_ranks, timeout)
        except RendezvousError as error:
            results[rank] = error
        finally:
            for fd in own:
                os.close(fd)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 40)
    return results


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_every_rank_gets_every_offer_with_its_descriptors(num_ranks: int) -> None:
    before = open_descriptors()
    results = meet(list(range(num_ranks)), num_ranks)
    for rank in range(num_ranks):
        assert set(results[rank]) == set(range(num_ranks)) - {rank}
        for other, offer in results[rank].items():
            assert offer.member.dp_rank == offer.content["rank"] == other
            assert len(offer.content["blocks"]) == 300_000
            for fd in offer.file_descriptors:
                assert os.pread(fd, 100, 0) == b"memory of rank %d" % other
                os.close(fd)
    assert open_descriptors() == before


def test_a_difference_names_its_key_and_both_ranks_on_every_rank() -> None:
    before = open_descriptors()
    results = meet([0, 1, 2], 3, lambda rank: {"flags": "same", "model": f"m{rank == 2}"}, 10.0)
    for rank, error in results.items():
        assert isinstance(error, RendezvousError)
        other = 2 if rank != 2 else 0
        assert f"DP rank {rank} and DP rank {other} differ in model" in str(error)
        assert "'mTrue'" in str(error)
        assert "'mFalse'" in str(error)
        assert "\n" not in str(error)
    assert open_descriptors() == before


def test_a_key_that_one_rank_lacks_is_a_difference() -> None:
    with pytest.raises(
        RendezvousError, match="DP rank 0 and DP rank 3 differ in dtype: None and 'bf16'"
    ):
        compare(Offer(Member(0), {}, {}, []), Offer(Member(3), {"dtype": "bf16"}, {}, []))


def test_a_missing_rank_is_named_in_time() -> None:
    before = open_descriptors()
    started = time.monotonic()
    results = meet([0, 2], 3, timeout=1.0)
    assert time.monotonic() - started < 5.0
    for error in results.values():
        assert isinstance(error, RendezvousError)
        assert "DP rank 1 did not come to the rendezvous within 1 s" in str(error)
    assert open_descriptors() == before


def test_groups_of_one_engine_do_not_meet() -> None:
    engine, dp_size, tp_size = uuid.uuid4().hex, 3, 2
    results: dict[Member, dict[int, Offer]] = {}

    def run(member: Member) -> None:
        offer = Offer(member, {"tp_rank": member.tp_rank}, {"of": str(member)}, [])
        results[member] = exchange(engine, offer, dp_size, 20.0)

    threads = [threading.Thread(target=run, args=(m,)) for m in members(dp_size, tp_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert set(results) == set(members(dp_size, tp_size))
    for member, offers in results.items():
        others = set(range(dp_size)) - {member.dp_rank}
        assert set(offers) == others
        for dp_rank, offer in offers.items():
            assert offer.member == Member(dp_rank, member.tp_rank, tp_size)
            assert offer.content["of"] == f"DP rank {dp_rank}, TP rank {member.tp_rank}"


CHILD = """
import os, sys
from sidp_sgl.scheduler.lifecycle.rendezvous import Offer, exchange
from sidp_sgl.scheduler.member import Member

group, rank, num_ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.memfd_create("own")
os.write(fd, b"from process %d" % rank)
offers = exchange(group, Offer(Member(rank), {"v": [1, 2]}, {"rank": rank}, [fd]), num_ranks, 30)
print(*(os.pread(o.file_descriptors[0], 50, 0).decode() for o in offers.values()), sep=",")
"""


def test_processes_meet() -> None:
    group, num_ranks = uuid.uuid4().hex, 3
    command = [sys.executable, "-c", CHILD, group]
    children = [
        subprocess.Popen([*command, str(rank), str(num_ranks)], stdout=subprocess.PIPE, text=True)
        for rank in range(num_ranks)
    ]
    try:
        for rank, child in enumerate(children):
            output, _ = child.communicate(timeout=40)
            others = [other for other in range(num_ranks) if other != rank]
            assert output.strip() == ",".join(f"from process {other}" for other in others)
    finally:
        for child in children:
            child.kill()
            child.wait()
