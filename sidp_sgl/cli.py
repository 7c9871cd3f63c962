"""The command `sidp-sgl`: finds the subcommand and hands over. Imports nothing before it must."""

import importlib
import sys
from collections.abc import Sequence

from sidp_sgl.errors import SidpUsageError

COMMANDS = {
    "plan": ("sidp_sgl.planner.plan.command", "is SiDP worth it, and with which settings?"),
    "calibrate": (
        "sidp_sgl.planner.calibrate.command",
        "measure this machine for plan and simulator",
    ),
    "run-batch": (
        "sidp_sgl.batch.command",
        "run a file of requests, in OpenAI's Batch format; continue it after any end",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 where the user has to change something, said in one line."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ("",)
    if command in ("", "-h", "--help"):
        print(_help(), file=sys.stdout if command else sys.stderr)
        return 0 if command else 2
    if command not in COMMANDS:
        return _fail("sidp-sgl", f"unknown command {command!r}: use one of {', '.join(COMMANDS)}")
    try:
        return importlib.import_module(COMMANDS[command][0]).main(rest)
    except SidpUsageError as error:
        return _fail(f"sidp-sgl {command}", str(error))


def _fail(program: str, reason: str) -> int:
    print(f"{program}: error: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _help() -> str:
    lines = [f"  {name:12} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: sidp-sgl COMMAND ...", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
