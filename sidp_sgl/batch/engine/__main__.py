"""The program of the engine's process: SGLang's own OpenAI handlers over `sgl.Engine`.

Imports sglang only once it runs. A request goes through the same handlers as on SGLang's server, so
that chat templates, sampling parameters, tools and log probabilities mean the same.
"""

import contextlib
import io
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import orjson
import psutil
import zmq

from sidp_sgl.batch.engine import model_path
from sidp_sgl.batch.engine_process import FAILED, PARSED, START
from sidp_sgl.batch.files.settings import settings_of
from sidp_sgl.errors import SidpError, SidpUsageError
from sidp_sgl.scheduler.lifecycle.liveness import one_line

_USAGE = 2  # exit code of a command line that is wrong
_REFUSED = {
    "skip_tokenizer_init": "texts go in and out",
    "is_embedding": "it generates text",
    "grpc_mode": "it is no server",
    "smg_grpc_mode": "it is no server",
    "use_ray": "it runs on one node; use one job per node",
}
_snapshots: list[str] = []  # paths


def main(address: str, arguments: Sequence[str]) -> None:
    threading.Thread(target=_end_with_the_job, daemon=True).start()
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(address)
    try:
        try:
            server_args, settings = _parse(arguments)
            socket.send_multipart([PARSED, orjson.dumps(settings)])
            if socket.recv() != START:
                return
            engine = _start(server_args)
        except (Exception, SystemExit) as error:
            if not isinstance(error, SidpError | SystemExit):
                traceback.print_exc()
            _tell_failure(socket, error)
            return
        from sidp_sgl.batch.engine.serving import serve

        try:
            serve(engine, socket)
        finally:
            engine.shutdown()
            _remove_snapshot()
    finally:
        context.destroy(linger=1000)


def _tell_failure(socket: zmq.Socket, error: BaseException) -> None:
    reason = "see the error above" if isinstance(error, SystemExit) else one_line(error)
    is_usage = isinstance(error, SidpUsageError) or getattr(error, "code", None) == _USAGE
    content = {"reason": reason, "usage": is_usage}
    socket.send_multipart([FAILED, orjson.dumps(content)])


def _parse(arguments: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """SGLang's arguments, and what of them the results depend on; raises SidpUsageError."""
    model_path.check_path(arguments)
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    quiet = [] if any(a.startswith("--log-level") for a in arguments) else ["--log-level", "error"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            server_args = prepare_server_args([*arguments, *quiet])
    except SystemExit:
        # The usage that argparse prints first has some hundred lines.
        last = (said.getvalue().strip().splitlines() or ["the flags were refused"])[-1]
        raise SidpUsageError(last.partition("error: ")[2] or last) from None
    except Exception as error:  # what argparse lets pass
        raise SidpUsageError(f"SGLang does not take these flags: {one_line(error)}") from None
    values = {name: getattr(server_args, name) for name in server_args.__struct_fields__}
    for name, reason in _REFUSED.items():
        if values.get(name):
            raise SidpUsageError(
                f"--{name.replace('_', '-')} does not go with run-batch: {reason}; leave it out"
            )
    model_path.check_config(server_args)
    return server_args, settings_of(values)


def _start(server_args: Any) -> Any:
    import sglang
    from sglang.srt.managers.load_snapshot import shm_path_for

    engine = sglang.Engine(server_args=server_args)
    _snapshots.append(shm_path_for(engine.port_args.instance_id))
    return engine


def _remove_snapshot() -> None:
    """Without --sidp SGLang leaves it in shared memory."""
    for path in _snapshots:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _end_with_the_job() -> None:
    """The job's process holds the other end of standard input."""
    while os.read(0, 1):
        pass
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _remove_snapshot()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
