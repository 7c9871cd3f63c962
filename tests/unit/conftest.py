"""Settings of the unit tests: the same examples everywhere, no deadline on shared machines."""

from hypothesis import settings

settings.register_profile("unit", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("unit")
