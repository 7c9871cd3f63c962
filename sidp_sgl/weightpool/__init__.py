"""Data plane: placement, layout, loading, pool, slots, prefetch, transports."""
