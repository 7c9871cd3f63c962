"""Data plane: who owns which block, fetching blocks (WaS), sending rows to their owners (CaS)."""
