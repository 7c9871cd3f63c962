"""What of a job is done: one bit per line of the input.

Pure.
"""

from sidp_sgl.batch.files.records import Record


class Done:
    """The lines that have a record, and how many of those are errors."""

    def __init__(self, num_lines: int) -> None:
        self._num_lines = num_lines
        self._bits = bytearray(num_lines // 8 + 1)
        self.num_records = 0
        self.num_errors = 0

    def __contains__(self, line: int) -> bool:
        return bool(self._bits[line >> 3] >> (line & 7) & 1)

    def add(self, record: Record) -> None:
        """Raises ValueError where the line is not of this input, or has a record already."""
        line = record.line
        if not 1 <= line <= self._num_lines:
            raise ValueError(f"the input has no line {line}")
        if line in self:
            raise ValueError(f"line {line} has two records")
        self._bits[line >> 3] |= 1 << (line & 7)
        self.num_records += 1
        self.num_errors += record.is_error
