"""`sidp-sgl run-batch`: reads the flags, checks the input, continues or begins the job.

Exit codes: 0 every request has its record, 1 the same command can continue the job, 2 the user has
to change something, 128 + N ended by signal N.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sidp_sgl.batch.engine_process import EngineProcess
from sidp_sgl.batch.errors import EngineEnded, Interrupted, JobError
from sidp_sgl.batch.input import Contents, InputFile
from sidp_sgl.batch.job import Job, Limits
from sidp_sgl.batch.output import OutputFile
from sidp_sgl.batch.progress import Progress, Tally
from sidp_sgl.batch.resume import Done
from sidp_sgl.batch.settings import StateFile
from sidp_sgl.batch.stop_signals import StopSignals
from sidp_sgl.errors import SidpUsageError

_DONE, _CONTINUABLE, _WRONG, _SIGNALLED = 0, 1, 2, 128
_EPILOG = """All other flags are those of `python -m sglang.launch_server`, SiDP's among them, for
example --model, --dp-size and --sidp. Docs: docs/run-batch.md"""


def main(arguments: Sequence[str]) -> int:
    args, engine_arguments = _parser().parse_known_args(arguments)
    try:
        _check(args)
        with StopSignals() as signals:
            return _run(args, engine_arguments, signals.check)
    except SidpUsageError as error:
        return _end(_WRONG, f"error: {error}")
    except (JobError, EngineEnded) as error:
        return _end(_CONTINUABLE, f"error: {error}")
    except Interrupted as stopped:
        exit_code = _SIGNALLED + stopped.signal_number
        return _end(exit_code, "stopped; run the same command again to continue")


def _end(exit_code: int, text: str) -> int:
    print(f"sidp-sgl run-batch: {text}", file=sys.stderr)
    return exit_code


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
    add("-i", "--input-file", type=Path, required=True, metavar="FILE", help="one request per line")
    add("-o", "--output-file", type=Path, required=True, metavar="FILE", help="one result per line")
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
        help="how often an engine that has ended is started again (default: %(default)s)",
    )
    add(
        "--max-in-flight",
        type=int,
        default=4096,
        metavar="N",
        help="requests in the engine at a time (default: %(default)s)",
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.max_restarts < 0:
        raise SidpUsageError(f"--max-restarts {args.max_restarts} is out of range: use 0 or more")
    if args.max_in_flight < 1:
        raise SidpUsageError(f"--max-in-flight {args.max_in_flight} is out of range: use 1 or more")


def _run(
    args: argparse.Namespace, engine_arguments: list[str], check_signals: Callable[[], None]
) -> int:
    input_file = InputFile(args.input_file)
    output = OutputFile(args.output_file)
    state = StateFile(args.output_file)
    first = EngineProcess(engine_arguments)  # reads its flags while the lines are checked here
    try:

        def on_tick() -> None:
            check_signals()
            first.look(0.0)

        contents = input_file.check(on_tick)
        settings = first.settings(check_signals)
        done = _continue(output, state, contents, settings, args.retry_errors)
        progress = Progress(Tally(contents.num_requests, num_before=done.num_records))
        limits = Limits(args.max_in_flight, args.max_restarts)
        job = Job(input_file.requests(done.__contains__), output, done, progress, limits)
        waiting = [first]

        def start() -> EngineProcess:
            engine = waiting.pop() if waiting else EngineProcess(engine_arguments)
            engine.start()
            return engine

        try:
            if done.num_records < contents.num_requests:
                job.run(start, check_signals)
        finally:
            progress.close()
            progress.say(progress.summary(done.num_errors))
        return _DONE
    finally:
        first.close()
        output.close(remove_empty=not state.exists())


def _continue(
    output: OutputFile,
    state: StateFile,
    contents: Contents,
    settings: dict[str, str],
    retry_errors: bool,
) -> Done:
    """What earlier runs have done, with the output repaired; raises SidpUsageError, JobError."""
    if output.num_bytes and not state.exists():
        raise SidpUsageError(
            f"--output-file {output.path} exists, and {state.path} that would say what it is does "
            "not: use another file"
        )
    if output.num_bytes:
        state.compare(contents, settings)
    else:
        state.write(contents, settings)
    done = Done(contents.num_lines)
    if num_torn := output.scan(done.add):
        print(
            f"sidp-sgl run-batch: cut {num_torn:,} bytes of an unfinished record off {output.path}",
            file=sys.stderr,
        )
    if retry_errors and done.num_errors:
        output.drop_errors()
        done = Done(contents.num_lines)
        output.scan(done.add)
    return done
