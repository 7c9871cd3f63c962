"""The input file: every line is checked, with its number, in bounded memory."""

import errno
import gzip
import os
import random
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.batch.errors import JobError
from sidp_sgl.batch.files import duplicates, input, request
from sidp_sgl.batch.files.duplicates import DuplicateFinder
from sidp_sgl.batch.files.input import InputFile
from sidp_sgl.errors import SidpUsageError
from tests.support.jobs import line, write_lines


class Stopped(Exception):
    pass


def written(path: Path, *texts: bytes) -> InputFile:
    path.write_bytes(b"".join(texts))
    return InputFile(path)


def good(number: int) -> bytes:
    return orjson.dumps(line(f"r{number}")) + b"\n"


def test_a_right_file(tmp_path: Path) -> None:
    """A byte order mark, blank lines, Windows' line ends and a last line without an end."""
    texts = [b"\xef\xbb\xbf", good(1), b"\n", good(2).replace(b"\n", b"\r\n"), b"  \n"]
    opened = written(tmp_path / "in", *texts, good(3).rstrip())
    contents = opened.check()
    assert (contents.num_lines, contents.num_requests) == (5, 3)
    assert contents.num_bytes == opened.path.stat().st_size
    found = [(found.line, found.custom_id) for found in opened.requests(lambda number: number == 3)]
    assert found == [(1, "r1"), (5, "r3")]


def test_wrong_lines_are_named_and_counted(tmp_path: Path) -> None:
    wrong = [good(1), b"oops\n", good(2), good(1), *[b"[]\n"] * 20]
    with pytest.raises(SidpUsageError) as caught:
        written(tmp_path / "in", *wrong).check()
    head, *shown, more = str(caught.value).splitlines()
    assert "22 lines are wrong, nothing was run" in head
    assert len(shown) == input.MAX_ERRORS_SHOWN and "and 12 more" in more
    assert shown[0].startswith("  line 2: not JSON")
    assert shown[1] == "  line 4: custom_id is the one of line 1"
    assert shown[2] == "  line 5: not a JSON object"


def test_no_requests(tmp_path: Path) -> None:
    with pytest.raises(SidpUsageError, match="has no requests"):
        written(tmp_path / "in", b"\n\n").check()


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SidpUsageError, match="No such file"):
        InputFile(tmp_path / "absent")
    with pytest.raises(SidpUsageError, match="--input-file"):
        InputFile(tmp_path)
    with pytest.raises(SidpUsageError, match=r"no regular file, .* use - for standard input"):
        InputFile(Path(os.devnull))
    os.mkfifo(tmp_path / "fifo")  # that nobody writes into
    with pytest.raises(SidpUsageError, match="no regular file"):
        InputFile(tmp_path / "fifo")


def test_gzip_is_read_by_its_content(tmp_path: Path) -> None:
    """Also twice, in several parts, and the job is the same as with the file as it was."""
    texts = [b"\xef\xbb\xbf", good(1), good(2), b"\n", good(3)]
    plain = written(tmp_path / "plain", *texts).check()
    packed = written(tmp_path / "in", *map(gzip.compress, texts))
    assert packed.check() == plain
    assert [found.custom_id for found in packed.requests(lambda _: False)] == ["r1", "r2", "r3"]


@pytest.mark.parametrize("damage", [slice(0, -9), slice(0, 15)])
def test_damaged_gzip(tmp_path: Path, damage: slice) -> None:
    content = gzip.compress(b"".join(map(good, range(1000))))
    with pytest.raises(SidpUsageError, match="in is damaged gzip data"):
        written(tmp_path / "in", content[damage]).check()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 0xFF
    with pytest.raises(SidpUsageError):
        written(tmp_path / "in", bytes(changed)).check()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_other_encodings_are_named(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    utf16 = good(1).decode().encode("utf-16")
    with pytest.raises(SidpUsageError, match="in is UTF-16: convert the file") as caught:
        written(tmp_path / "in", pack(utf16))
    assert "\n" not in str(caught.value)
    latin = orjson.dumps(line("r2", "caf\u00e9")).decode().encode("latin-1") + b"\n"
    with pytest.raises(
        SidpUsageError, match=r"line 2 is not UTF-8 but, it seems, Latin-1"
    ) as caught:
        written(tmp_path / "in", pack(good(1) + latin + latin)).check()
    assert "\n" not in str(caught.value)


def test_an_input_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = written(tmp_path / "in", good(1))

    class Broken:
        def seek(self, place: int) -> None: ...

        def readline(self, size: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(opened, "_file", Broken())
    with pytest.raises(JobError, match="in: Input/output error"):
        opened.check()


def test_seeds_are_counted(tmp_path: Path) -> None:
    """Of requests that sample: temperature 0 needs none."""
    lines = [
        line("a"),
        line("b", seed=1),
        line("c", seed=1, temperature=0),
        line("d", seed=None),
        line("e", seed=0, temperature=0.7),
    ]
    opened = InputFile(write_lines(tmp_path / "in", lines))
    opened.check()
    assert opened.num_seeded == 2


def test_a_line_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (input, request):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 2**20)
    opened = written(tmp_path / "in", good(1), b"x" * (5 * 2**20), b"\n", good(2))
    with pytest.raises(SidpUsageError) as caught:
        opened.check()
    assert str(caught.value).splitlines()[1:] == ["  line 2: longer than 1 MiB"]


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    opened = written(tmp_path / "in", good(1), good(2), good(3))
    opened.check()
    running = opened.requests(lambda _: False)
    next(running)
    with open(opened.path, "ab") as file:
        file.write(good(4))
    with pytest.raises(JobError, match="restore it"):
        list(running)


def test_the_digest_tells_contents_apart(tmp_path: Path) -> None:
    digests = {
        written(tmp_path / "in", *(good(number) for number in numbers)).check().digest
        for numbers in ([1, 2], [2, 1], [1, 3])
    }
    assert len(digests) == 3


def test_the_check_can_be_stopped(tmp_path: Path) -> None:
    opened = InputFile(write_lines(tmp_path / "in", (line(str(n)) for n in range(20_000))))

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        opened.check(stop)


def test_no_room_for_the_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DuplicateFinder, "add", fail)
    with pytest.raises(JobError, match="No space left on device; make room, or set TMPDIR"):
        written(tmp_path / "in", good(1)).check()


@given(st.lists(st.sampled_from("abcdefgh"), max_size=30), st.integers(1, 200))
def test_duplicates(ids: list[str], buffer_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_BUFFER", buffer_bytes)
        with DuplicateFinder() as finder:
            for number, custom_id in enumerate(ids, start=1):
                finder.add(custom_id, number)
            found = sorted(finder.duplicates())
    expected = [
        (number, ids.index(custom_id) + 1)
        for number, custom_id in enumerate(ids, start=1)
        if custom_id in ids[: number - 1]
    ]
    assert found == expected


def test_duplicates_far_apart() -> None:
    numbers = list(range(50_000))
    random.Random(0).shuffle(numbers)
    with DuplicateFinder() as finder:
        for number in numbers:
            finder.add(f"request-{number}", number)
        finder.add("request-17", 99_999)
        assert list(finder.duplicates()) == [(99_999, 17)]
