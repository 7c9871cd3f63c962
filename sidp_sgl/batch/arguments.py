"""The command line of `sidp-sgl run-batch`; what is not its own is the engine's."""

import argparse
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from sidp_sgl.batch.files.output import REWRITTEN
from sidp_sgl.batch.files.state import NEW, SUFFIX
from sidp_sgl.batch.files.streams import STANDARD
from sidp_sgl.errors import SidpUsageError

_EPILOG = """All other flags are those of `python -m sglang.launch_server`, SiDP's among them, for
example --model, --dp-size and --sidp. Docs: docs/run-batch.md"""


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the engine's arguments."""
    return _parser().parse_known_args(arguments)


def check(args: argparse.Namespace) -> None:
    """What can be said without opening a file to write; raises SidpUsageError."""
    if args.max_restarts < 0:
        raise SidpUsageError(f"--max-restarts {args.max_restarts} is out of range: use 0 or more")
    if args.max_in_flight < 1:
        raise SidpUsageError(f"--max-in-flight {args.max_in_flight} is out of range: use 1 or more")
    if "://" in args.input_file:
        raise SidpUsageError(
            f"--input-file {args.input_file} is a URL, and run-batch reads local files: fetch it "
            "first, or pipe it into -i - (curl -L, aws s3 cp URL -)"
        )
    if "://" in args.output_file:
        raise SidpUsageError(
            f"--output-file {args.output_file} is a URL, and run-batch writes local files, so that "
            "it can go on with them: copy the file at the end, or pipe -o - (aws s3 cp - URL)"
        )
    if args.retry_errors and args.output_file == STANDARD:
        raise SidpUsageError(
            "--retry-errors does not go with --output-file -, where no results of an earlier run "
            "are: leave one of them out"
        )
    _check_that_the_input_stays(args.input_file, args.output_file)


def _check_that_the_input_stays(input_file: str, output_file: str) -> None:
    source = 0 if input_file == STANDARD else input_file
    written: list[str | int] = [1]
    if output_file != STANDARD:
        suffixes = ("", REWRITTEN, SUFFIX, SUFFIX + NEW)
        written = [f"{Path(output_file)}{suffix}" for suffix in suffixes]
    for target in written:
        if _are_one(source, target):
            what = "" if target == written[0] else f", and {target} is written, too"
            raise SidpUsageError(
                f"--output-file {output_file} and --input-file {input_file} are one file{what}: "
                "use another --output-file"
            )


def _are_one(path: str | int, other: str | int) -> bool:
    try:
        status = os.stat(path)
        return stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.stat(other))
    except (OSError, ValueError):
        return False  # one of them does not exist


def _parser() -> argparse.ArgumentParser:
    # Abbreviations would take SGLang's flags for these.
    parser = argparse.ArgumentParser(
        prog="sidp-sgl run-batch",
        usage="%(prog)s -i in.jsonl -o out.jsonl --model MODEL [any flag of SGLang or SiDP]",
        description="Run a file of requests in OpenAI's Batch format; continue it after any end.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "-i",
        "--input-file",
        required=True,
        metavar="FILE",
        help="one request per line, gzipped or not; - for standard input",
    )
    add(
        "-o",
        "--output-file",
        required=True,
        metavar="FILE",
        help="one result per line; - for standard output, which can't be continued",
    )
    add(
        "--retry-errors",
        action="store_true",
        help="take the error records out of the output and run their requests again",
    )
    add(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="how often an engine is started again that has ended, and not because of one request "
        "(default: %(default)s)",
    )
    add(
        "--max-in-flight",
        type=int,
        default=4096,
        metavar="N",
        help="requests in the engine at a time (default: %(default)s)",
    )
    return parser
