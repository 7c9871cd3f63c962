"""Where tensors and rows may begin. Needs no torch: the planner counts with it as well."""

ALIGNMENT = 256  # bytes; what cudaMalloc guarantees and vectorised kernels expect


def align(number: int, step: int = ALIGNMENT) -> int:
    """`number` rounded up to a multiple of `step`."""
    return -(-number // step) * step
