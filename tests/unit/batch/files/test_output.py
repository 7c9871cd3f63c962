"""The output file: whole records, groups on the disk, repair after any cut, one writer."""

import errno
import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from sidp_sgl.batch.errors import JobError
from sidp_sgl.batch.files.output import GROUP_RECORDS, GROUP_SECONDS, OutputFile
from sidp_sgl.batch.files.records import Answer, Record, write_record
from sidp_sgl.batch.files.resume import Done
from sidp_sgl.errors import SidpUsageError

RECORDS = [write_record(f"r{n}", Answer(n, 400 if n == 3 else 200, b"{}")) for n in range(1, 5)]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def found_in(output: OutputFile) -> tuple[list[int], int]:
    """Lines of the records, and how many bytes were cut off."""
    found: list[Record] = []
    num_torn = output.scan(found.append)
    return [record.line for record in found], num_torn


def test_a_cut_at_every_byte(tmp_path: Path) -> None:
    """What is whole stays, the rest goes, and the next record follows without a gap."""
    content = b"".join(RECORDS)
    ends = [len(b"".join(RECORDS[:number])) for number in range(len(RECORDS) + 1)]
    for cut in range(len(content) + 1):
        path = tmp_path / "out"
        path.write_bytes(content[:cut])
        output = OutputFile(path)
        num_whole = sum(end <= cut for end in ends) - 1
        assert found_in(output) == (list(range(1, num_whole + 1)), cut - ends[num_whole])
        output.append(RECORDS[num_whole : num_whole + 1])
        output.close()
        assert path.read_bytes() == b"".join(RECORDS[: num_whole + 1])


def test_zeros_after_a_power_cut(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(RECORDS[0] + bytes(5000))
    output = OutputFile(path)
    assert found_in(output) == ([1], 5000)
    assert path.read_bytes() == RECORDS[0]


def test_what_is_no_crash_is_not_repaired(tmp_path: Path) -> None:
    path = tmp_path / "out"
    content = RECORDS[0] + b"edited\n" + RECORDS[1]
    path.write_bytes(content)
    with pytest.raises(SidpUsageError, match="line 2 is no result of this job"):
        OutputFile(path).scan(lambda _: None)
    assert path.read_bytes() == content


@pytest.mark.parametrize("last", [RECORDS[0], write_record("x", Answer(9, 200, b"{}"))])
def test_records_of_another_input(tmp_path: Path, last: bytes) -> None:
    path = tmp_path / "out"
    path.write_bytes(RECORDS[0] + last)
    with pytest.raises(SidpUsageError, match="line 2 is no result of this job"):
        OutputFile(path).scan(Done(num_lines=4).add)


def test_groups(tmp_path: Path) -> None:
    """A group goes to the disk when it is full or a second old; nothing is synced twice."""
    sizes: list[int] = []
    clock = Clock()
    output = OutputFile(
        tmp_path / "out", lambda descriptor: sizes.append(os.fstat(descriptor).st_size), clock
    )
    output.sync_group()
    output.append(RECORDS[:1] * (GROUP_RECORDS - 1))
    assert not sizes
    assert output.path.stat().st_size == len(RECORDS[0]) * (GROUP_RECORDS - 1)
    output.append(RECORDS[:1])
    assert sizes == [len(RECORDS[0]) * GROUP_RECORDS]
    output.append(RECORDS[:1])
    clock.now += GROUP_SECONDS * 0.9
    output.sync_group()
    assert len(sizes) == 1
    clock.now += GROUP_SECONDS * 0.2
    output.sync_group()
    output.sync_group()
    output.sync()
    assert sizes[1:] == [len(RECORDS[0]) * (GROUP_RECORDS + 1)]


@pytest.mark.parametrize("num_written", [0, 1, 50, len(RECORDS[1])])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_written: int) -> None:
    output = OutputFile(tmp_path / "out")
    output.append(RECORDS[:1])
    write, calls = os.write, 0

    def full(descriptor: int, content: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > 1 or not num_written:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:num_written])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(JobError, match=r"No space left on device: see to the disk"):
        output.append(RECORDS[1:])
    monkeypatch.undo()
    assert output.path.read_bytes() == RECORDS[0]
    output.append(RECORDS[1:])
    assert output.path.read_bytes() == b"".join(RECORDS)


def fill_limited(path: Path, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    output = OutputFile(path)
    with pytest.raises(JobError, match="File too large"):
        output.append(RECORDS)
    output.append(RECORDS[:1])


def test_a_limit_on_the_size(tmp_path: Path) -> None:
    path = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=fill_limited, args=(path, len(RECORDS[0]) + 10))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert path.read_bytes() == RECORDS[0]


def test_a_failed_sync(tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    output = OutputFile(tmp_path / "out", fail)
    output.append(RECORDS)
    with pytest.raises(JobError, match="Input/output error"):
        output.sync()


def test_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "out"
    first = OutputFile(path)
    with pytest.raises(SidpUsageError, match="written by another run-batch"):
        OutputFile(path)
    first.append(RECORDS)
    first.drop_errors()  # another file, at the same place
    with pytest.raises(SidpUsageError, match="written by another run-batch"):
        OutputFile(path)
    first.close()
    OutputFile(path).close()


def test_a_file_replaced_while_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opens the file that is about to be replaced must not write into the old one."""
    path = tmp_path / "out"
    path.write_bytes(RECORDS[0])
    lock: Callable[[OutputFile, int], None] = OutputFile._lock
    replaced = []

    def replace_first(output: OutputFile, descriptor: int) -> None:
        if not replaced:
            replaced.append(True)
            (tmp_path / "new").write_bytes(RECORDS[1])
            os.rename(tmp_path / "new", path)
        lock(output, descriptor)

    monkeypatch.setattr(OutputFile, "_lock", replace_first)
    output = OutputFile(path)
    output.append(RECORDS[2:3])
    assert path.read_bytes() == RECORDS[1] + RECORDS[2]


def test_dropping_errors(tmp_path: Path) -> None:
    output = OutputFile(tmp_path / "out")
    output.append(RECORDS)
    output.drop_errors()
    assert found_in(output) == ([1, 2, 4], 0)
    output.append(RECORDS[2:3])
    assert found_in(output) == ([1, 2, 4, 3], 0)
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_while_dropping_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = OutputFile(tmp_path / "out")
    output.append(RECORDS)

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(JobError, match="No space left"):
        output.drop_errors()
    assert output.path.read_bytes() == b"".join(RECORDS)
    assert os.listdir(tmp_path) == ["out"]


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SidpUsageError, match="No such file"):
        OutputFile(tmp_path / "absent" / "out")
    with pytest.raises(SidpUsageError, match="directory"):
        OutputFile(tmp_path)
    with pytest.raises(SidpUsageError, match="no regular file"):
        OutputFile(Path(os.devnull))
