"""Groups of ranks that are threads of this process, with real collectives (gloo)."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

SECONDS = 30


def in_ranks(size: int, function: Callable[[dist.ProcessGroup], Any]) -> list[Any]:
    """`function` on every rank of a group; what each returned, by rank."""
    store, results, errors = dist.HashStore(), [None] * size, []

    def run(rank: int) -> None:
        try:
            group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=SECONDS))
            results[rank] = function(group)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
