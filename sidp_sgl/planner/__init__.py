"""Is SiDP worth it: memory and time model, and measuring a machine for them."""
