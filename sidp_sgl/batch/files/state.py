"""What a job that continues has to know beside its output: what it is, and what is suspect."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from sidp_sgl.batch.errors import JobError
from sidp_sgl.batch.files.input import Contents
from sidp_sgl.batch.files.output import sync_directory
from sidp_sgl.batch.suspects import Suspects
from sidp_sgl.errors import SidpUsageError

SUFFIX = ".state"
NEW = ".new"  # suffix of the file that takes the state's place
_FORMAT = 1


class StateFile:
    """Lies beside the output; there from before the first record on.

    After `write` or `compare`: `suspects`, ranges of lines (`batch.suspects`), and `num_lost`, how
    many runs in a row had requests in an engine and ended without a word: killed, or with the
    machine.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(output.name + SUFFIX)
        self._output = output
        self._state: dict[str, Any] = {}

    @property
    def suspects(self) -> list[tuple[int, int, int]]:
        return self._state.get("suspects", [])

    @property
    def num_lost(self) -> int:
        return self._state.get("num_lost", 0)

    def exists(self) -> bool:
        return self.path.exists()

    def write(self, contents: Contents, settings: Mapping[str, str]) -> None:
        """At once or not at all; raises JobError."""
        self._save({"format": _FORMAT, "input": contents._asdict(), "settings": dict(settings)})

    def note(self, suspects: Suspects, is_running: bool) -> None:
        """`is_running`: whether an engine has requests; a run that says so last is lost."""
        num_lost = self.num_lost + 1 if is_running else 0
        self._save({**self._state, "suspects": suspects.ranges, "num_lost": num_lost})

    def _save(self, state: dict[str, Any]) -> None:
        new = self.path.with_name(self.path.name + NEW)
        try:
            with open(new, "wb") as file:
                file.write(orjson.dumps(state, option=orjson.OPT_INDENT_2) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise JobError(f"{self.path}: {error.strerror}") from None
        self._state = state

    def compare(self, contents: Contents, settings: Mapping[str, str]) -> None:
        """Raises SidpUsageError naming what is not as it was when the job began."""
        try:
            state = orjson.loads(self.path.read_bytes())
            is_known = state["format"] == _FORMAT
            before, began_with = state["input"], state["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            is_known = False
        if not is_known:
            raise SidpUsageError(
                f"{self.path} is no state of a job that this version can read: restore it, or use "
                "another --output-file"
            )
        changes = [
            f"{name} was {began_with.get(name, 'absent')}, is {settings.get(name, 'absent')}"
            for name in sorted({*began_with, *settings})
            if began_with.get(name) != settings.get(name)
        ]
        if before != contents._asdict():
            changes.insert(
                0,
                f"the input had {before['num_requests']:,} requests and {before['num_bytes']:,} "
                f"bytes, has {contents.num_requests:,} and {contents.num_bytes:,}"
                + (", with other content" if before["num_bytes"] == contents.num_bytes else ""),
            )
        if changes:
            raise SidpUsageError(
                f"--output-file {self._output} was begun with other settings: "
                f"{'; '.join(changes)}; use those again, or another --output-file"
            )
        self._state = state
