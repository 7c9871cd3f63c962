"""Which rank owns which layer. Pure."""


def owner_of(layer: int, num_layers: int, num_ranks: int, placement: str) -> int:
    """Owner of `layer`: `interleaved` is layer mod d; `contiguous` gives each rank one run.

    Runs differ by at most one layer; with fewer layers than ranks the last ranks own nothing.
    """
    if placement == "interleaved":
        return layer % num_ranks
    if placement == "contiguous":
        longer, extra = divmod(num_layers, num_ranks)
        # The first `extra` ranks own one layer more.
        boundary = extra * (longer + 1)
        if layer < boundary:
            return layer // (longer + 1)
        return extra + (layer - boundary) // longer
    raise ValueError(f"unknown placement {placement!r}")


def owners(num_layers: int, num_ranks: int, placement: str) -> list[int]:
    """Owner of every layer, in layer order."""
    return [owner_of(layer, num_layers, num_ranks, placement) for layer in range(num_layers)]
