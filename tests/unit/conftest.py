"""Settings of the unit tests: the same examples everywhere, no deadline on shared machines."""

import uuid

import pytest
from hypothesis import settings

settings.register_profile("unit", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("unit")


@pytest.fixture
def engine_name() -> str:
    """Of an engine that nobody else has."""
    return uuid.uuid4().hex
