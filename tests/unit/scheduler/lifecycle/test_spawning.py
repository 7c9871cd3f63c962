"""What processes inherit that are started as an engine's."""

import importlib
import multiprocessing
import multiprocessing.synchronize
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from sidp_sgl.scheduler.lifecycle import spawning


def send_name_of_semaphore(connection: Connection) -> None:
    importlib.import_module("joblib")
    connection.send(multiprocessing.synchronize.SemLock._make_name())  # type: ignore[attr-defined]


def test_joblib_does_not_rename_the_semaphores_that_the_janitor_removes(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with spawning.marked("test-spawning", tmp_path):
        process = context.Process(target=send_name_of_semaphore, args=(theirs,))
        process.start()
    assert ours.poll(60)
    assert ours.recv().startswith("/sidp-test-spawning")
    process.join(10)
