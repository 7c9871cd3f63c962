"""What an engine's other processes report to its main process: pools, errors, exits.

An error that the main process knows of needs no traceback in the log when it is SiDP's own; of any
other the traceback is logged first.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.runtime_context import get_parallel

from sidp_sgl.errors import SidpError
from sidp_sgl.scheduler.lifecycle.liveness import Exited, Pooled, give_up, tie, watch_process
from sidp_sgl.scheduler.member import Member

logger = logging.getLogger(__name__)


class RankReports:
    """In a DP scheduler process."""

    def __init__(self, engine: str, member: Member) -> None:
        self._engine = engine
        self._member = member
        self._lifeline = tie(engine)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """An error inside ends the process and is reported."""
        try:
            yield
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Report `error`, which has been caught, and end the process."""
        if not isinstance(error, SidpError):
            logger.error("%s fails", self._member, exc_info=error)
        give_up(self._engine, self._member, error)

    def pooled(self) -> None:
        """The rank has started, and its pool is active."""
        self._lifeline.send(Pooled(self._member))


class ControllerReports:
    """In the DP controller process, the parent of all ranks."""

    def __init__(self, engine: str) -> None:
        self._lifeline = tie(engine)

    def start(self, original: Any, process: Any) -> None:
        """`Process.start`: a rank is watched from the moment it exists. SGLang keeps a list of the
        ranks' processes, but not of whose they are, and waits for their pools before it goes on."""
        arguments = inspect.signature(process._target).bind(*process._args).arguments
        original(process)  # which forgets target and arguments
        member = Member(arguments["dp_rank"], arguments["tp_rank"], get_parallel().tp_size)
        watch_process(process, lambda pid, code: self._lifeline.send(Exited(member, pid, code)))
