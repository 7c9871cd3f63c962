"""Standard input and standard output as the files of a job: `-i -` and `-o -`."""

import os
import select
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import BinaryIO

from sidp_sgl.batch.errors import JobError
from sidp_sgl.errors import SidpUsageError

STANDARD = "-"
_READ_BYTES = 2**20
_POLL_SECONDS = 0.2


def spool_standard_input(on_tick: Callable[[], None]) -> BinaryIO:
    """All of it, in a file without a name under TMPDIR, since the job reads its input twice.

    `on_tick` is called now and then, and may raise. Raises SidpUsageError or JobError.
    """
    try:
        source = sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):
        raise SidpUsageError("--input-file - and standard input is closed") from None
    spool = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        while True:
            on_tick()
            if not select.select([source], [], [], _POLL_SECONDS)[0]:
                continue
            if not (content := os.read(source, _READ_BYTES)):
                spool.flush()
                return spool
            spool.write(content)
    except OSError as error:
        spool.close()
        raise JobError(
            f"--input-file -, kept in {tempfile.gettempdir()}: {error.strerror}; make room, or set "
            "TMPDIR"
        ) from None
    except BaseException:
        spool.close()
        raise


class StandardOutput:
    """Records as they come. Nothing is kept, so that a job can't be continued."""

    def __init__(self) -> None:
        """Raises SidpUsageError."""
        try:
            self._descriptor = sys.stdout.fileno()
            os.fstat(self._descriptor)
        except (OSError, ValueError, AttributeError):
            raise SidpUsageError("--output-file - and standard output is closed") from None

    def append(self, records: Sequence[bytes]) -> None:
        content = memoryview(b"".join(records))
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError as error:
            raise JobError(f"--output-file -: {error.strerror}") from None

    def sync_group(self) -> None: ...

    def sync(self) -> None: ...


class NoJournal:
    """Of a job that can't be continued."""

    def note(self, suspects: object, is_running: bool) -> None: ...
