"""Puts the sockets and segments of an engine with --sidp where its janitor finds them.

Used by the main process and by the DP controller, which both make PortArgs.
"""

import os
from pathlib import Path
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks import arguments
from sidp_sgl.sglang_hooks.required import Hook

_directories: dict[str, Path] = {}  # by group


def place(group: str, directory: Path) -> None:
    """From now on the sockets of `group` are made in `directory`."""
    _directories[group] = directory


def _init_new(original: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    port_args = original(server_args, *args, **kwargs)
    config = arguments.config_of(server_args)
    if config is not None and config.group in _directories:
        port_args.instance_id = config.group  # names the load snapshot in /dev/shm
        for field, address in vars(port_args).items():
            if isinstance(address, str) and address.startswith("ipc://"):
                path = address.removeprefix("ipc://")
                os.unlink(path)  # an empty temporary file that only reserves the name
                moved = _directories[config.group] / Path(path).name
                setattr(port_args, field, f"ipc://{moved}")
    return port_args


HOOK = Hook("sglang.srt.server_args.PortArgs.init_new", _init_new, HookType.AROUND)
