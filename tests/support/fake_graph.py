"""A captured graph that is executed in any order that its edges allow: an edge that is missing
shows as wrong bytes, one that CUDA forbids as CUDA's error."""

import random
from collections.abc import Callable, Iterable

from sidp_sgl.weightpool.transport.cuda.driver import CudaError

Work = Callable[[], None]


class FakeGraph:
    """Nodes in the order of capture, each with the nodes that it comes after."""

    def __init__(self) -> None:
        self.has_ended = False
        self._nodes: list[tuple[Work, frozenset[int]]] = []
        self._tails: dict[int, frozenset[int]] = {}  # stream → what its next node comes after

    def __len__(self) -> int:
        return len(self._nodes)

    def tail(self, stream: int) -> frozenset[int]:
        return self._tails.get(stream, frozenset())

    def add(self, stream: int, work: Work) -> None:
        self._nodes.append((work, self.tail(stream)))
        self._tails[stream] = frozenset({len(self._nodes) - 1})

    def join(self, stream: int, nodes: Iterable[int]) -> None:
        self._tails[stream] = self.tail(stream) | frozenset(nodes)

    def end(self, stream: int) -> None:
        """The capture's own stream must come after everything else."""
        self.has_ended = True
        reached: set[int] = set()
        open_nodes = set(self.tail(stream))
        while open_nodes:
            node = open_nodes.pop()
            reached.add(node)
            open_nodes |= self._nodes[node][1] - reached
        if len(reached) != len(self._nodes):
            raise CudaError("cuStreamEndCapture: CUDA_ERROR_STREAM_CAPTURE_UNJOINED (904)")

    def execute(self, dice: random.Random, *, ignore_edges: bool = False) -> None:
        """`ignore_edges` is the negative control."""
        waiting = dict(enumerate(self._nodes))
        while waiting:
            ready = [
                number
                for number, (_, after) in waiting.items()
                if ignore_edges or not any(node in waiting for node in after)
            ]
            work, _ = waiting.pop(dice.choice(ready))
            work()
