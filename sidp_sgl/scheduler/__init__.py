"""Control plane: dispatch, modes and leases, the lifecycle of an engine. No torch, no sglang."""
