"""Faults on purpose, for tests of the control plane: SIDP_TEST_DISTURBANCES in the environment.

Room: scheduler. For example `switch_every=5,decline=0.2,delay=0.1,delay_ms=20,seed=1`: the mode
changes every five decode steps, one request in five is declined, one in ten answered 20 ms late.
"""

import os
import random
import time
from dataclasses import dataclass, fields

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.scheduler.modes.policy import CAS, WAS, ModePolicy

VARIABLE = "SIDP_TEST_DISTURBANCES"


@dataclass(frozen=True)
class Disturbances:
    """Probabilities between 0 and 1; `switch_every` in decode steps, 0 for never."""

    switch_every: int = 0
    decline: float = 0.0
    delay: float = 0.0
    delay_ms: float = 0.0
    seed: int = 0


def from_environment() -> Disturbances | None:
    """What the environment asks for; raises SidpUsageError where it can't be read."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    types = {field.name: field.type for field in fields(Disturbances)}
    try:
        pairs = dict(part.split("=") for part in text.split(","))
        return Disturbances(**{name: types[name](value) for name, value in pairs.items()})  # type: ignore[operator]
    except (KeyError, ValueError) as error:
        raise SidpUsageError(f"{VARIABLE}={text!r} can't be read ({error!r})") from None


class DisturbedAnswers:
    """Declines and delays requests at random; called by the control thread."""

    def __init__(self, disturbances: Disturbances, rank: int) -> None:
        self._disturbances = disturbances
        self._random = random.Random(1000 * disturbances.seed + rank)

    def refusal(self) -> str | None:
        if self._random.random() < self._disturbances.delay:
            time.sleep(self._disturbances.delay_ms / 1e3)
        return "disturbed" if self._random.random() < self._disturbances.decline else None


class ForcedSwitches(ModePolicy):
    """Changes the mode every `steps` decode steps, whatever the batch."""

    def __init__(self, steps: int) -> None:
        super().__init__("auto")
        self._steps = steps
        self._count = 0

    def decide(self, batch_size: int, threshold: int | None) -> str:
        wanted = WAS if self._count // self._steps % 2 else CAS
        if self._count and wanted != self.mode:
            self.switches += 1
            self.reasons["forced"] = self.reasons.get("forced", 0) + 1
        self.mode = wanted
        self._count += 1
        return self.mode
