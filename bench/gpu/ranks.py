"""Ranks of a check: processes on one GPU (or threads, where a test asks), connected by sockets over
which they exchange what real ranks exchange at their rendezvous."""

import json
import multiprocessing
import queue
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from bench.gpu.device import Gpu

_MAX_FDS = 16


class Rank:
    """One of `num_ranks`; `peers`: a socket to each of the others."""

    def __init__(self, number: int, peers: dict[int, socket.socket]) -> None:
        self.number, self.num_ranks = number, len(peers) + 1
        self._peers = peers

    def exchange(
        self, content: Any, file_descriptors: Sequence[int] = ()
    ) -> dict[int, tuple[Any, list[int]]]:
        """Give every peer `content` (JSON) and descriptors; returns theirs."""
        body = json.dumps(content).encode()
        for peer in self._peers.values():
            socket.send_fds(peer, [struct.pack("<Q", len(body))], list(file_descriptors))
            peer.sendall(body)
        received = {}
        for number, peer in self._peers.items():
            header, fds, _, _ = socket.recv_fds(peer, 8, _MAX_FDS)
            data = bytearray()
            while header and len(data) < struct.unpack("<Q", header)[0]:
                piece = peer.recv(struct.unpack("<Q", header)[0] - len(data))
                if not piece:
                    break
                data += piece
            if not data:
                raise RuntimeError(f"rank {number} has ended")
            received[number] = json.loads(data), list(fds)
        return received

    def barrier(self) -> None:
        self.exchange(None)


RankFunction = Callable[..., Any]


def _run(
    function: RankFunction, rank: Rank, make_gpu: Callable[[], Gpu], results: Any, *args: Any
) -> None:
    try:
        results.put((rank.number, True, function(rank, make_gpu(), *args)))
    except BaseException:
        results.put((rank.number, False, traceback.format_exc()))


def run_ranks(
    gpu: Gpu, num_ranks: int, function: RankFunction, *args: Any, seconds: float = 100.0
) -> list[Any]:
    """`function(rank, gpu, *args)` on every rank; its results, JSON values, by rank. `seconds`
    includes the imports of every rank's process, from a cold disk."""
    ends: list[dict[int, socket.socket]] = [{} for _ in range(num_ranks)]
    for one in range(num_ranks):
        for other in range(one):
            ends[one][other], ends[other][one] = socket.socketpair()
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue() if gpu.in_processes else queue.Queue()
    make = type(gpu)
    workers: list[Any] = []
    for number in range(num_ranks):
        arguments = (function, Rank(number, ends[number]), make, results, *args)
        if gpu.in_processes:
            workers.append(context.Process(target=_run, args=arguments, daemon=True))
        else:
            workers.append(threading.Thread(target=_run, args=arguments, daemon=True))
        workers[-1].start()
    if gpu.in_processes:  # so that a rank hears of another's end
        _close(ends)
    by_rank: dict[int, Any] = {}
    try:
        deadline = time.monotonic() + seconds
        while len(by_rank) < num_ranks:
            number, is_result, value = _result(results, workers, deadline)
            if not is_result:
                raise RuntimeError(f"rank {number} failed:\n{value}")
            by_rank[number] = value
        for worker in workers:
            worker.join(20.0)
    except queue.Empty:
        missing = sorted(set(range(num_ranks)) - set(by_rank))
        raise RuntimeError(f"ranks {missing} did not end within {seconds:.0f} s") from None
    finally:
        for worker in workers:
            if gpu.in_processes and worker.is_alive():
                worker.kill()
        _close(ends)
    return [by_rank[number] for number in range(num_ranks)]


def _result(results: Any, workers: list[Any], deadline: float) -> tuple[int, bool, Any]:
    """The next rank's; queue.Empty at the deadline, RuntimeError where a rank crashed."""
    while True:
        try:
            return results.get(timeout=min(1.0, max(0.01, deadline - time.monotonic())))
        except queue.Empty:
            codes = {n: getattr(worker, "exitcode", None) for n, worker in enumerate(workers)}
            crashed = {number: code for number, code in codes.items() if code}
            if crashed:
                raise RuntimeError(f"ranks have crashed (rank: exit code): {crashed}") from None
            if time.monotonic() > deadline:
                raise


def _close(ends: list[dict[int, socket.socket]]) -> None:
    for sockets in ends:
        for end in sockets.values():
            end.close()
