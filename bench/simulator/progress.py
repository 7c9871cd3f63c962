"""How far a request has come on its rank.

Room: planner; pure.
"""

from dataclasses import dataclass

from bench.simulator.job import Request


@dataclass(slots=True)
class Progress:
    """A request on this rank. `generated` is right while it waits; while it runs, `generated` and
    the decode steps since `since` are."""

    request: Request
    max_new_tokens: int
    generated: int = 0  # output tokens
    cached: int = 0  # tokens of prompt and output in the KV cache, while it is prefilled
    since: int = 0  # decode steps of the rank when it began to run
    ends: int = -1  # decode steps of the rank when it will have ended; -1 while it doesn't run

    @property
    def to_prefill(self) -> int:
        """Tokens, generated ones after a retraction among them."""
        return self.request.input_len + self.generated

    @property
    def to_generate(self) -> int:
        """Tokens at most, as far as the scheduler knows."""
        return self.max_new_tokens - self.generated
