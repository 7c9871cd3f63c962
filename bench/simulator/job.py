"""Jobs: how many requests of which lengths arrive when.

The same job and seed give the same requests, whatever runs them.
"""

import math
import random
from dataclasses import dataclass

FIXED, LOG_NORMAL, PARETO = "fixed", "log-normal", "pareto"


@dataclass(frozen=True)
class Lengths:
    """Distribution of lengths in tokens, cut off at `limit` (which lowers the mean).

    `spread`: standard deviation of the logarithm (log-normal), or the exponent (Pareto, above 1).
    """

    kind: str
    mean: float
    spread: float = 0.0
    limit: int = 1 << 20

    def __post_init__(self) -> None:
        if self.kind not in (FIXED, LOG_NORMAL, PARETO):
            raise ValueError(f"no such distribution: {self.kind}")
        if not 1 <= self.mean <= self.limit or not math.isfinite(self.mean):
            raise ValueError(f"a mean length of {self.mean} is not within 1 and {self.limit}")
        if self.spread < 0 or (self.kind == PARETO and self.spread <= 1):
            raise ValueError(f"a spread of {self.spread} is too small")

    def sample(self, dice: random.Random) -> int:
        if self.kind == FIXED:
            return round(self.mean)
        if self.kind == LOG_NORMAL:
            # The logarithm's mean, so that the mean of the lengths is `mean`.
            centre = math.log(self.mean) - self.spread**2 / 2
            drawn = dice.lognormvariate(centre, self.spread)
        else:
            drawn = self.mean * (self.spread - 1) / self.spread * dice.paretovariate(self.spread)
        return max(1, min(round(drawn), self.limit))


@dataclass(frozen=True)
class Job:
    """`rate`: requests per second (Poisson); None: all are there from the start."""

    num_requests: int
    inputs: Lengths
    outputs: Lengths
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.num_requests < 0 or (self.rate is not None and self.rate <= 0):
            raise ValueError("a job has no less than 0 requests, and a rate above 0")


@dataclass(slots=True)
class Request:
    """Lengths in tokens, times in seconds; `max_new_tokens` is what the scheduler knows.

    The simulation fills in what became of it; `finish` stays below 0 until it is done.
    """

    number: int
    arrival: float
    input_len: int
    output_len: int
    max_new_tokens: int
    rank: int = -1
    first_token: float = -1.0
    finish: float = -1.0
    retractions: int = 0


def make_requests(job: Job, seed: int = 0) -> list[Request]:
    """In order of arrival."""
    lengths, arrivals = (random.Random(f"{seed} {name}") for name in ("lengths", "arrivals"))
    fixed = job.outputs.kind == FIXED
    now, requests = 0.0, []
    for number in range(job.num_requests):
        if job.rate is not None:
            now += arrivals.expovariate(job.rate)
        input_len, output_len = job.inputs.sample(lengths), job.outputs.sample(lengths)
        limit = output_len if fixed else job.outputs.limit
        requests.append(Request(number, now, input_len, output_len, limit))
    return requests
