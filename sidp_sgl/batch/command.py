"""`sidp-sgl run-batch`: checks the input, continues or begins the job.

Exit codes: 0 every request has its record, 1 the same command can continue the job, 2 the user has
to change something, 128 + N ended by signal N.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sidp_sgl.batch import arguments
from sidp_sgl.batch.engine_process import EngineProcess
from sidp_sgl.batch.errors import EngineEnded, Interrupted, JobError
from sidp_sgl.batch.files.input import Contents, InputFile
from sidp_sgl.batch.files.output import OutputFile
from sidp_sgl.batch.files.resume import Done
from sidp_sgl.batch.files.settings import DETERMINISTIC
from sidp_sgl.batch.files.state import StateFile
from sidp_sgl.batch.files.streams import STANDARD, NoJournal, StandardOutput, spool_standard_input
from sidp_sgl.batch.job import Job, Journal, Output
from sidp_sgl.batch.progress import Progress, Tally
from sidp_sgl.batch.stop_signals import StopSignals
from sidp_sgl.batch.suspects import Suspects
from sidp_sgl.batch.window import Bounds, Window
from sidp_sgl.errors import SidpUsageError

_DONE, _CONTINUABLE, _WRONG, _SIGNALLED = 0, 1, 2, 128
_MANY_LOST = 2  # runs in a row that were killed: their requests may have done it


class _Before(NamedTuple):
    """What earlier runs of the job have left."""

    done: Done
    suspects: Suspects
    num_lost: int  # runs in a row
    output: Output
    journal: Journal


def main(command_line: Sequence[str]) -> int:
    args, engine_arguments = arguments.read(command_line)
    again = "run the same command again to continue"
    if args.output_file == STANDARD:
        again = "what it has written is whole; run the same command again for all of it"
    try:
        arguments.check(args)
        with StopSignals() as signals:
            return _run(args, engine_arguments, signals.check)
    except SidpUsageError as error:
        return _end(_WRONG, f"error: {error}")
    except (JobError, EngineEnded) as error:
        return _end(_CONTINUABLE, f"error: {error}; {again}")
    except Interrupted as stopped:
        return _end(_SIGNALLED + stopped.signal_number, f"stopped; {again}")


def _end(exit_code: int, text: str) -> int:
    _say(text)
    return exit_code


def _say(text: str) -> None:
    print(f"sidp-sgl run-batch: {text}", file=sys.stderr)


def _run(
    args: argparse.Namespace, engine_arguments: list[str], check_signals: Callable[[], None]
) -> int:
    spool = spool_standard_input(check_signals) if args.input_file == STANDARD else None
    input_file = InputFile(Path(args.input_file), spool)
    output = OutputFile(Path(args.output_file)) if args.output_file != STANDARD else None
    first = EngineProcess(engine_arguments)  # reads its flags while the lines are checked here
    try:

        def on_tick() -> None:
            check_signals()
            first.look(0.0)

        contents = input_file.check(on_tick)
        settings = first.settings(check_signals)
        if output is None:
            before = _Before(Done(contents.num_lines), Suspects(), 0, StandardOutput(), NoJournal())
        else:
            before = _continue(output, contents, settings, args.retry_errors)
        if input_file.num_seeded and DETERMINISTIC not in settings:
            _say(
                f"{input_file.num_seeded:,} requests have a seed, which SGLang keeps to with "
                f"{DETERMINISTIC} only: without it they are sampled anew each time"
            )
        done = before.done
        progress = Progress(Tally(contents.num_requests, num_before=done.num_records))
        requests = input_file.requests(done.__contains__)
        window = Window(requests, Bounds(args.max_in_flight), before.suspects)
        job = Job(window, before.output, done, progress, before.journal, args.max_restarts)
        waiting = [first]

        def start() -> EngineProcess:
            engine = waiting.pop() if waiting else EngineProcess(engine_arguments)
            engine.start()
            return engine

        try:
            if done.num_records < contents.num_requests:
                if before.num_lost >= _MANY_LOST:
                    job.suspect_what_was_lost()
                job.run(start, check_signals)
        finally:
            progress.close()
            progress.say(progress.summary(done.num_errors))
        return _DONE
    finally:
        first.close()
        if output is not None:
            output.close(remove_empty=not StateFile(output.path).exists())


def _continue(
    output: OutputFile, contents: Contents, settings: dict[str, str], retry_errors: bool
) -> _Before:
    """What earlier runs have done, with the output repaired; raises SidpUsageError, JobError."""
    state = StateFile(output.path)
    if output.num_bytes and not state.exists():
        raise SidpUsageError(
            f"--output-file {output.path} exists, and {state.path} that would say what it is does "
            "not: use another file"
        )
    try:
        state.compare(contents, settings)
    except SidpUsageError:
        if output.num_bytes:
            raise
        state.write(contents, settings)
    done = Done(contents.num_lines)
    if num_torn := output.scan(done.add):
        _say(f"cut {num_torn:,} bytes of an unfinished record off {output.path}")
    if retry_errors and done.num_errors:
        output.drop_errors()
        done = Done(contents.num_lines)
        output.scan(done.add)
    return _Before(done, Suspects(state.suspects), state.num_lost, output, state)
