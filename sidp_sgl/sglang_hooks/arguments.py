"""SiDP's flags on every SGLang command line, and the same as keywords of `sgl.Engine`.

The config rides on ServerArgs as `_sidp`, a plain dict: a private attribute survives the seal and
the pickling into every process. How TP ranks sample rides beside it, for that goes without --sidp.
"""

import argparse
import sys
import uuid
from dataclasses import replace
from typing import Any, NoReturn

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.server_args import ServerArgs

from sidp_sgl.config import OWN_DISPATCH, SidpConfig, flag_name
from sidp_sgl.errors import SidpError, SidpUsageError
from sidp_sgl.sglang_hooks.cpu import memory as cpu_memory
from sidp_sgl.sglang_hooks.required import Hook, check_version

ATTRIBUTE = "_sidp"
SAMPLING_ATTRIBUTE = "_sidp_sampling"


def config_of(server_args: Any) -> SidpConfig | None:
    """The SidpConfig of an engine that was started with --sidp, else None."""
    values = getattr(server_args, ATTRIBUTE, None)
    return SidpConfig(**values) if values else None


def attach(server_args: Any, config: SidpConfig) -> None:
    setattr(server_args, ATTRIBUTE, config.as_dict())


def sampling_of(server_args: Any) -> str | None:
    """`SidpConfig.sampling`: as asked for, and as decided once `sampling.conditions` has."""
    return getattr(server_args, SAMPLING_ATTRIBUTE, None)


def set_sampling(server_args: Any, sampling: str | None) -> None:
    setattr(server_args, SAMPLING_ATTRIBUTE, sampling)


def exit_with(error: SidpError) -> NoReturn:
    """End a command-line process with one line."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def is_command_line(server_args: Any) -> bool:
    return getattr(server_args, "_sidp_command_line", False)


def _add_flags(result: Any, parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if action.dest == "load_balance_method" and action.choices is not None:
            action.choices = [*action.choices, OWN_DISPATCH]
    group = parser.add_argument_group("SiDP (sidp_sgl)")
    for name, options in SidpConfig.flags().items():
        if name == "sidp":
            group.add_argument("--sidp", action="store_true", help=options["help"])
        else:
            group.add_argument(flag_name(name), **options)


def _from_cli_args(original: Any, cls: type, args: argparse.Namespace) -> Any:
    method = args.load_balance_method
    if method == OWN_DISPATCH:
        args.load_balance_method = "auto"  # SGLang knows its own methods only
    server_args = original(cls, args)
    values = {name: getattr(args, name) for name in SidpConfig.flags() if hasattr(args, name)}
    try:
        _attach_checked(server_args, values, method, is_server=True)
    except SidpError as error:
        exit_with(error)
    server_args._sidp_command_line = True
    return server_args


def _server_args_from_keywords(**keywords: Any) -> ServerArgs:
    """Stands for `ServerArgs` in `Engine(**keywords)`."""
    values = {name: keywords.pop(name) for name in SidpConfig.flags() if name in keywords}
    unknown = [name for name in keywords if name.startswith("sidp")]
    if unknown:
        raise SidpError(
            f"Engine keyword {unknown[0]} is unknown: SiDP takes {', '.join(SidpConfig.flags())}"
        )
    method = keywords.get("load_balance_method", "auto")
    if method == OWN_DISPATCH:
        keywords["load_balance_method"] = "auto"
    server_args = ServerArgs(**keywords)
    _attach_checked(server_args, values, method, is_server=False)
    return server_args


def _init_engine(original: Any, engine: Any, *args: Any, **keywords: Any) -> None:
    """`Engine(server_args=…)`, with arguments of a command line that starts no server."""
    config = config_of(keywords.get("server_args"))
    if config is not None:
        attach(keywords["server_args"], replace(config, is_server=False))
    original(engine, *args, **keywords)


def _attach_checked(server_args: Any, values: dict[str, Any], method: str, is_server: bool) -> None:
    """`method`: as the user said it, of load balancing."""
    cpu_memory.device_total_bytes()  # a size that can't be read is refused here, in one line
    config = SidpConfig.from_values(values)
    if config.sidp or config.sampling:
        check_version()
    set_sampling(server_args, config.sampling)
    if config.sidp:
        attach(server_args, config.of_engine(uuid.uuid4().hex, method, is_server))
    elif method == OWN_DISPATCH:
        raise SidpUsageError(
            f"--load-balance-method {OWN_DISPATCH} has no effect without --sidp: add it"
        )


def install_keywords() -> None:
    """Let `sgl.Engine` take SiDP's keywords (hooking `Engine.__init__` would come too late)."""
    if Engine.server_args_class is ServerArgs:
        Engine.server_args_class = staticmethod(_server_args_from_keywords)


HOOKS = [
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", _add_flags, HookType.AFTER),
    Hook("sglang.srt.server_args.ServerArgs.from_cli_args", _from_cli_args, HookType.AROUND),
    Hook("sglang.srt.entrypoints.engine.Engine.__init__", _init_engine, HookType.AROUND),
]
