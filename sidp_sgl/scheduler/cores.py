"""Which cores each CPU rank gets: more threads than cores per rank is ruinous. Room: scheduler."""


def plan_cores(cores: list[int], num_ranks: int) -> list[list[int]]:
    """Cores of every rank: disjoint and contiguous while they last, else one each in turn.

    >>> plan_cores([0, 1, 2, 3], 2)
    [[0, 1], [2, 3]]
    >>> plan_cores([0, 1], 4)
    [[0], [1], [0], [1]]
    """
    if num_ranks >= len(cores):
        return [[cores[rank % len(cores)]] for rank in range(num_ranks)]
    per_rank = len(cores) // num_ranks
    return [cores[rank * per_rank : (rank + 1) * per_rank] for rank in range(num_ranks)]
