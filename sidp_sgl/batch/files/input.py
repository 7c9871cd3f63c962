"""The input file, read twice: once to check every line, once to run what is not done.

One line is in memory at a time.
"""

import gzip
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sidp_sgl.batch.errors import JobError
from sidp_sgl.batch.files import encoding
from sidp_sgl.batch.files.duplicates import DuplicateFinder
from sidp_sgl.batch.files.request import MAX_LINE_BYTES, EncodingError, LineError, Request, parse
from sidp_sgl.errors import SidpUsageError

MAX_ERRORS_SHOWN = 10
_LINES_PER_TICK = 10_000
_DIGEST = 16  # bytes
_BOM = b"\xef\xbb\xbf"


class Contents(NamedTuple):
    """What was found in an input file that is right."""

    num_lines: int  # blank ones among them
    num_requests: int
    num_bytes: int  # uncompressed
    digest: str  # of all these bytes


class InputFile:
    """A regular file that stays as it is while the job runs; UTF-8, as it is or in gzip."""

    def __init__(self, path: Path, opened: BinaryIO | None = None) -> None:
        """`opened`: where the bytes are, if not at `path`. Raises SidpUsageError."""
        self.path = path
        self.num_seeded = 0  # requests that `check` has found to ask for a seed
        try:
            self._on_disk = opened or open(path, "rb", opener=_open_at_once)  # noqa: SIM115
        except OSError as error:
            raise SidpUsageError(f"--input-file {path}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(self._on_disk.fileno()).st_mode):
            raise SidpUsageError(
                f"--input-file {path} is no regular file, and it is read twice: use - for standard "
                "input"
            )
        self._version = self._current_version()
        self._file: BinaryIO | gzip.GzipFile = self._on_disk
        if encoding.is_gzip(self._start()):
            self._on_disk.seek(0)
            self._file = gzip.GzipFile(fileobj=self._on_disk)
        if what_to_do := encoding.what_to_do(self._start()):
            raise SidpUsageError(f"--input-file {path} {what_to_do}")

    def _start(self) -> bytes:
        self._file.seek(0)
        return self._read(self._file.read, encoding.NUM_BYTES)

    def _current_version(self) -> tuple[int, int]:
        status = os.fstat(self._on_disk.fileno())
        return status.st_size, status.st_mtime_ns

    def check(self, on_tick: Callable[[], None] = lambda: None) -> Contents:
        """Every line; raises SidpUsageError with the first wrong lines and their number.

        `on_tick` is called now and then, and may raise. Raises JobError where the digests of the
        custom_ids find no room.
        """
        try:
            with DuplicateFinder() as ids:
                return self._check(ids, on_tick)
        except OSError as error:
            folder = tempfile.gettempdir()
            raise JobError(
                f"comparing the custom_ids in {folder}: {error.strerror}; make room, or set TMPDIR"
            ) from None

    def _check(self, ids: DuplicateFinder, on_tick: Callable[[], None]) -> Contents:
        errors: list[tuple[int, str]] = []  # the first ones only
        num_errors = num_requests = num_bytes = line = 0
        digest = blake2b(digest_size=_DIGEST)

        def on_bytes(text: bytes) -> None:
            nonlocal num_bytes
            num_bytes += len(text)
            digest.update(text)

        for line, text in self._lines(on_bytes):
            if line % _LINES_PER_TICK == 0:
                on_tick()
            if not text.strip():
                continue
            num_requests += 1
            try:
                request = parse(line, text)
                ids.add(request.custom_id, line)
                self.num_seeded += request.is_seeded
            except EncodingError as error:
                raise SidpUsageError(f"--input-file {self.path}: line {line} {error}") from None
            except LineError as error:
                num_errors += 1
                if len(errors) < MAX_ERRORS_SHOWN:
                    errors.append((line, str(error)))
        for repeated, first in ids.duplicates():
            num_errors += 1
            errors.append((repeated, f"custom_id is the one of line {first}"))
            errors = sorted(errors)[:MAX_ERRORS_SHOWN]
        if num_errors:
            raise SidpUsageError(self._report(errors, num_errors))
        if not num_requests:
            raise SidpUsageError(f"--input-file {self.path} has no requests")
        return Contents(line, num_requests, num_bytes, digest.hexdigest())

    def _report(self, errors: list[tuple[int, str]], num_errors: int) -> str:
        lines = [f"  line {line}: {reason}" for line, reason in errors]
        if (more := num_errors - len(errors)) > 0:
            lines.append(f"  and {more:,} more")
        wrong = "1 line is wrong" if num_errors == 1 else f"{num_errors:,} lines are wrong"
        head = f"--input-file {self.path}: {wrong}, nothing was run; correct the file"
        return "\n".join([head, *lines])

    def requests(self, is_done: Callable[[int], bool]) -> Iterator[Request]:
        """What is not done, in the file's order; raises JobError where the file has changed."""
        for line, text in self._lines():
            if not text.strip() or is_done(line):
                continue
            try:
                request = parse(line, text)
            except LineError:
                request = None
            if request is None or self._current_version() != self._version:
                raise JobError(
                    f"--input-file {self.path} has changed while the job ran: restore it"
                )
            yield request

    def _lines(
        self, on_bytes: Callable[[bytes], None] = lambda _: None
    ) -> Iterator[tuple[int, bytes]]:
        """Number and text of every line; of one that is too long only the beginning."""
        self._file.seek(0)
        number = 0
        while text := self._read_line():
            number += 1
            on_bytes(text)
            rest = text
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                if not (rest := self._read_line()):
                    break
                on_bytes(rest)
            yield number, text.removeprefix(_BOM) if number == 1 else text

    def _read_line(self) -> bytes:
        return self._read(self._file.readline, MAX_LINE_BYTES + 1)

    def _read(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            return read(size)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise SidpUsageError(
                f"--input-file {self.path} is damaged gzip data ({error}): fetch or write it again"
            ) from None
        except OSError as error:
            raise JobError(f"--input-file {self.path}: {error.strerror}") from None

    def close(self) -> None:
        self._file.close()
        self._on_disk.close()


def _open_at_once(path: str, flags: int) -> int:
    """A FIFO would wait for somebody who writes."""
    return os.open(path, flags | os.O_NONBLOCK)
