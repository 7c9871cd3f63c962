"""Finds custom_ids that come twice, in memory that does not grow with the input.

Digests go to files by their first byte; equal ones meet in the same file, and one file after the
other is read. 24 bytes of temporary disk space per line.
"""

import tempfile
from collections.abc import Iterator
from hashlib import blake2b
from types import TracebackType
from typing import IO

_BUCKETS = 256
_DIGEST = 16  # bytes: no two of 10¹² different ids share one, but for a chance of 10⁻¹⁵
_NUMBER = 8
_ENTRY = _DIGEST + _NUMBER
_BUFFER = 16 * 2**10  # bytes per file


class DuplicateFinder:
    """Use as a context; `add` every id, then ask for the `duplicates`. Raises OSError."""

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory
        self._buffers = [bytearray() for _ in range(_BUCKETS)]
        self._files: list[IO[bytes] | None] = [None] * _BUCKETS

    def __enter__(self) -> "DuplicateFinder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            if file is not None:
                file.close()

    def add(self, custom_id: str, line: int) -> None:
        digest = blake2b(custom_id.encode(), digest_size=_DIGEST).digest()
        buffer = self._buffers[digest[0]]
        buffer += digest + line.to_bytes(_NUMBER)
        if len(buffer) >= _BUFFER:
            self._spill(digest[0])

    def _spill(self, bucket: int) -> None:
        file = self._files[bucket]
        if file is None:
            file = self._files[bucket] = tempfile.TemporaryFile(  # noqa: SIM115
                dir=self._directory
            )
        file.write(self._buffers[bucket])
        self._buffers[bucket].clear()

    def duplicates(self) -> Iterator[tuple[int, int]]:
        """Line of the repeated id and line where it came first; in no order over the file."""
        for bucket in range(_BUCKETS):
            first: dict[bytes, int] = {}
            for digest, line in self._entries(bucket):
                if digest in first:
                    yield line, first[digest]
                else:
                    first[digest] = line

    def _entries(self, bucket: int) -> Iterator[tuple[bytes, int]]:
        content = bytes(self._buffers[bucket])
        if (file := self._files[bucket]) is not None:
            file.seek(0)
            content = file.read() + content
        for start in range(0, len(content), _ENTRY):
            digest_end = start + _DIGEST
            number = int.from_bytes(content[digest_end : start + _ENTRY])
            yield content[start:digest_end], number
