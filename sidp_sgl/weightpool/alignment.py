"""Where tensors and rows may begin. Needs no torch: the planner counts with it as well."""

ALIGNMENT = 256  # bytes; what cudaMalloc guarantees and vectorised kernels expect


def align(num_bytes: int) -> int:
    """`num_bytes` rounded up to a multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
