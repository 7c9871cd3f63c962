"""Memory model: exact bytes and KV capacity."""
