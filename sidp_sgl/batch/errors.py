"""How a job ends before its time."""

from sidp_sgl.errors import SidpError


class JobError(SidpError):
    """The job can't go on now; once the cause is gone, the same command continues it."""


class EngineEnded(Exception):
    """The engine has ended, with what was running in it; the text says why."""


class Interrupted(Exception):
    """The user or the system asked the job to stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
