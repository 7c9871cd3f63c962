"""Control plane: rendezvous, liveness, later rank state and negotiation. No torch, no sglang."""
