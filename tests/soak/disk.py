"""A small disk that gets full."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_BYTES = 16 * 2**20


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    size = f"size={DISK_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, num_free: int) -> Path:
    """A file that leaves only so many bytes of the disk, in whole pages."""
    path = disk / "filler"
    free = os.statvfs(disk)
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_bsize - num_free)
    return path
