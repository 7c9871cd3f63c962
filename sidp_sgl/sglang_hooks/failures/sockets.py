"""SGLang's sockets and load snapshot without a name in a file system.

An engine's processes are killed when it ends, and may be killed before: what has a name would stay.
Abstract sockets and anonymous files go with the last process that uses them.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq
from sglang.srt.environ import envs
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks import arguments, required
from sidp_sgl.sglang_hooks.required import Hook

_made: list[zmq.Socket] | None = None  # by the launch that is under way


def _make_addresses(original: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """`PortArgs.init_new`, in the main process and, for every rank, in the DP controller."""
    port_args = original(server_args, *args, **kwargs)
    config = arguments.config_of(server_args)
    if config is not None:
        port_args.instance_id = _snapshot_path(config.engine)
        for field, address in vars(port_args).items():
            if isinstance(address, str) and address.startswith("ipc://"):
                path = Path(address.removeprefix("ipc://"))
                path.unlink()  # an empty file that only reserves the name
                setattr(port_args, field, f"ipc://@sidp-{config.engine}-{path.name}")
    return port_args


@functools.cache
def _snapshot_path(engine: str) -> str:
    """Of a file that lives as long as this process; the ranks use the main process's.

    It is never closed: a rank that comes late must not find another file under its number.
    """
    return f"/proc/{os.getpid()}/fd/{os.memfd_create('sglang-loads')}"


def _path_of_snapshot(original: Any, instance_id: str) -> str:
    """`load_snapshot.shm_path_for`."""
    return instance_id if instance_id.startswith("/proc/") else original(instance_id)


def _take(_: Any, socket: zmq.Socket, *__: Any) -> None:
    """`config_socket`, before a socket is bound: an abstract one has no permissions."""
    socket.set(zmq.IPC_FILTER_UID, os.getuid())
    if _made is not None:
        _made.append(socket)


@contextmanager
def closed_on_failure() -> Iterator[None]:
    """Sockets that are made inside are closed where it ends in an error: what SGLang has made so
    far is garbage then, and to collect a context whose sockets are open is to wait for ever."""
    global _made
    made: list[zmq.Socket] = []
    _made = made
    try:
        yield
    except BaseException:
        for socket in made:
            socket.close(linger=0)
        raise
    finally:
        _made = None


def hide_names() -> None:
    """In every process of an engine with --sidp, before it makes any of them."""
    required.apply(_HOOKS)
    # A queue between TP ranks in a named segment, which nothing that goes with --sidp uses.
    envs.SGLANG_USE_MESSAGE_QUEUE_BROADCASTER.set(False)


_HOOKS = [
    Hook("sglang.srt.server_args.PortArgs.init_new", _make_addresses, HookType.AROUND),
    Hook(
        "sglang.srt.managers.load_snapshot.shm_path_for",
        _path_of_snapshot,
        HookType.AROUND,
    ),
    Hook("sglang.srt.utils.network.config_socket", _take, HookType.AFTER),
]
