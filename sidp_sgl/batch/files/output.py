"""The output file: whole records only, appended as they come, safe on disk group by group.

A record is with the kernel as soon as it is appended, so that killing the process
loses nothing; what a power cut can lose is one group, and its requests run again. Whatever ends a
write, the file is a sequence of whole records, or becomes one by cutting its end off.
"""

import fcntl
import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sidp_sgl.batch.errors import JobError
from sidp_sgl.batch.files.records import Record, read_record
from sidp_sgl.errors import SidpUsageError

GROUP_RECORDS = 256
GROUP_SECONDS = 1.0
REWRITTEN = ".rewritten"  # suffix of the file that takes the output's place


class OutputFile:
    """Locked from opening to closing: one job at a time writes a file."""

    def __init__(
        self,
        path: Path,
        sync: Callable[[int], None] = os.fsync,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises SidpUsageError."""
        self.path = path
        self._sync, self._clock = sync, clock
        self._descriptor = self._open()
        self._rewritten = path.with_name(path.name + REWRITTEN)
        self._rewritten.unlink(missing_ok=True)  # of a run that was killed
        self._end = os.fstat(self._descriptor).st_size  # of the last whole record
        self._num_unsynced = 0
        self._unsynced_since = 0.0

    def _open(self) -> int:
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            except OSError as error:
                raise SidpUsageError(f"--output-file {self.path}: {error.strerror}") from None
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise SidpUsageError(
                        f"--output-file {self.path} is no regular file: a job that continues "
                        "reads what is there"
                    )
                self._lock(descriptor)
                if self._is_at_path(descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # another job has just put a rewritten file here

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SidpUsageError(
                f"--output-file {self.path} is written by another run-batch: wait for its end, or "
                "use another file"
            ) from None

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    @property
    def num_bytes(self) -> int:
        return self._end

    def scan(self, on_record: Callable[[Record], None]) -> int:
        """Every record that is there. Cuts off a torn end, and returns its size in bytes.

        Raises SidpUsageError where what is no record has records after it: a crash does not do
        that. What `on_record` raises as ValueError counts as no record.
        """
        good = line = torn_line = 0
        with open(self.path, "rb") as file:
            for line, text in enumerate(file, start=1):
                record = read_record(text)
                if record is None:
                    torn_line = torn_line or line
                    continue
                if torn_line:
                    raise self._not_ours(torn_line)
                try:
                    on_record(record)
                except ValueError:
                    raise self._not_ours(line) from None
                good += len(text)
        num_torn = self._end - good
        if num_torn:
            self._cut(good)
        return num_torn

    def _not_ours(self, line: int) -> SidpUsageError:
        return SidpUsageError(
            f"--output-file {self.path}: line {line} is no result of this job: restore the file, "
            "or use another one"
        )

    def append(self, records: Sequence[bytes]) -> None:
        """Raises JobError; the file then holds what it held before."""
        content = memoryview(b"".join(records))
        start = self._end
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError as error:
            self._cut(start)
            raise self._error(error) from None
        self._end = start + sum(map(len, records))
        if not self._num_unsynced:
            self._unsynced_since = self._clock()
        self._num_unsynced += len(records)
        self.sync_group()

    def sync_group(self) -> None:
        """Bring the group to the disk where it is full or old enough; raises JobError."""
        age = self._clock() - self._unsynced_since
        if self._num_unsynced and (self._num_unsynced >= GROUP_RECORDS or age >= GROUP_SECONDS):
            self.sync()

    def sync(self) -> None:
        """Bring all that was appended to the disk; raises JobError."""
        if self._num_unsynced:
            try:
                self._sync(self._descriptor)
            except OSError as error:
                raise self._error(error) from None
            self._num_unsynced = 0

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._descriptor, size)
            self._end = size
        except OSError as error:
            raise self._error(error) from None

    def _error(self, error: OSError) -> JobError:
        return JobError(
            f"--output-file {self.path}: {error.strerror}: see to the disk; what is in the file is "
            "whole"
        )

    def drop_errors(self) -> None:
        """Rewrite the file without its error records, at once or not at all; raises JobError."""
        path = self._rewritten
        try:
            with open(self.path, "rb") as old, open(path, "wb") as new:
                for text in old:
                    record = read_record(text)
                    if record is not None and not record.is_error:
                        new.write(text)
                new.flush()
                os.fsync(new.fileno())
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
            self._lock(descriptor)  # before anybody can find it
            os.rename(path, self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise self._error(error) from None
        os.close(self._descriptor)
        self._descriptor = descriptor
        self._end = os.fstat(descriptor).st_size

    def close(self, remove_empty: bool = False) -> None:
        if remove_empty and not self._end:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def sync_directory(path: Path) -> None:
    """So that a file that was made or renamed in it is still there after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
