"""Nothing of an engine has a name in a file system, and no other user gets at its sockets."""

import os
import tempfile
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from sglang.srt.managers.load_snapshot import (
    LoadSnapshot,
    ShmLoadSnapshotReader,
    ShmLoadSnapshotWriter,
)

from sidp_sgl.config import SidpConfig
from sidp_sgl.sglang_hooks import arguments
from sidp_sgl.sglang_hooks.failures import sockets


def make_port_args(server_args: Any) -> SimpleNamespace:
    """As SGLang does: every name is reserved by an empty file."""
    with tempfile.NamedTemporaryFile(delete=False) as one:
        return SimpleNamespace(rpc_ipc_name=f"ipc://{one.name}", nccl_port=1, instance_id="name")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def server_args() -> SimpleNamespace:
    made = SimpleNamespace()
    arguments.attach(
        made, SidpConfig(sidp=True).of_engine(uuid.uuid4().hex, "auto", is_server=False)
    )
    return made


def test_addresses_are_abstract_and_differ(folder: Path) -> None:
    engine = server_args()
    made = [sockets._make_addresses(make_port_args, engine).rpc_ipc_name for _ in range(2)]
    assert all(address.startswith("ipc://@sidp-") for address in made)
    assert len(set(made)) == 2
    assert not list(folder.iterdir())


def test_engines_without_sidp_keep_theirs(folder: Path) -> None:
    made = sockets._make_addresses(make_port_args, SimpleNamespace())
    assert Path(made.rpc_ipc_name.removeprefix("ipc://")).parent == folder
    assert sockets._path_of_snapshot(lambda name: f"/dev/shm/{name}", "name") == "/dev/shm/name"


def test_loads_are_read_from_an_anonymous_file(folder: Path) -> None:
    engines = [server_args(), server_args()]
    paths = []
    for engine in engines:
        name = sockets._make_addresses(make_port_args, engine).instance_id
        assert sockets._make_addresses(make_port_args, engine).instance_id == name
        paths.append(sockets._path_of_snapshot(lambda name: f"/dev/shm/{name}", name))
    writer = ShmLoadSnapshotWriter(paths[0], 2, 1)
    writer.write(LoadSnapshot(dp_rank=1, num_running_reqs=7))
    (load,) = ShmLoadSnapshotReader(paths[0], 2).read_all()
    assert (load.dp_rank, load.num_running_reqs) == (1, 7)
    assert not ShmLoadSnapshotReader(paths[1], 2).read_all(), "every engine has its own"
    assert os.readlink(paths[0]).startswith("/memfd:")


@pytest.mark.parametrize("is_own", [True, False])
def test_only_the_own_user_can_connect(is_own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"ipc://@sidp-{uuid.uuid4().hex}"
    user = os.getuid() if is_own else os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: user)
    with zmq.Context() as context, context.socket(zmq.PULL) as ours:
        sockets._take(None, ours, zmq.PULL)
        ours.bind(address)
        with context.socket(zmq.PUSH) as theirs:
            theirs.set(zmq.LINGER, 0)
            theirs.connect(address)
            theirs.send(b"")
            assert bool(ours.poll(10_000 if is_own else 500)) == is_own


@pytest.mark.parametrize("fails", [True, False])
def test_what_a_failed_launch_has_opened_is_closed(fails: bool) -> None:
    """Whoever collects the context does not wait for its sockets."""
    context = zmq.Context()
    before, inside = context.socket(zmq.PUSH), context.socket(zmq.PUSH)
    sockets._take(None, before)
    try:
        with sockets.closed_on_failure():
            sockets._take(None, inside)
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert inside.closed == fails and not before.closed
    context.destroy(linger=0)
