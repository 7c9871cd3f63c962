"""Processes of engines under test without the 20 s of imports that each would begin with.

`multiprocessing`'s spawned processes are forked from a template that has imported what they import
first. They are children of whoever starts them and have its descriptors, environment, directory and
cores, as if spawned; only the imports are done. Engines that tests start by a command line, or
whose traces they look for, do not come this way, so that SGLang's own way is tested too.
"""

import ctypes
import fcntl
import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing import spawn, util
from typing import Any

import psutil
from setproctitle import setproctitle

from sidp_sgl.scheduler.lifecycle.liveness import ENGINE, tie

# What unpickling the targets of SGLang's processes imports.
IMPORTED = (
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.data_parallel_controller",
)
# Nothing reads these while it is imported; a template serves whatever their values are.
LATE = (
    *("SIDP_", "PYTEST_", "PYTHONPATH", "SGLANG_RUN_ID", "SGLANG_CPU_OMP_THREADS_BIND"),
    "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER",
)
TITLE = "template"  # of a process that others are forked from
MARK = "SIDP_TEST"  # in the environment of processes whose traces are looked for
STANDARD = (0, 1, 2)
ABOVE_ALL = 512  # descriptors from here on are not those that a process expects
LONGEST = 1 << 20  # bytes of a request
PR_SET_CHILD_SUBREAPER = 36

spawn_program = util.spawnv_passfds
children_of = psutil.Process.children


class Template:
    """The process to fork from, seen from the one that starts others."""

    def __init__(self, connection: socket.socket, pid: int, environment: dict[str, str]) -> None:
        self.connection = connection
        self.pid = pid
        self.environment = environment

    @classmethod
    def start(cls) -> "Template":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from tests.support import forked; "
            f"exec(forked.serve({theirs.fileno()}))"
        )
        command = [spawn.get_executable(), *util._args_from_interpreter_flags(), "-c", program]
        environment = imported_under()
        with theirs:
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        process.returncode = 0  # nobody waits for it: it ends with this process
        return cls(ours, process.pid, environment)

    def fork(self, program: str, descriptors: Sequence[int]) -> int:
        """A child of this process that executes the program; its pid."""
        numbers = [*STANDARD, *descriptors]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        cores = os.sched_getaffinity(0)
        request = (program, numbers, dict(os.environ), os.getcwd(), cores, mask)
        adopt_orphans(True)
        try:
            socket.send_fds(self.connection, [pickle.dumps(request)], numbers)
            return int(self.connection.recv(LONGEST))
        finally:
            adopt_orphans(False)


_template: Template | None = None
_lock = threading.Lock()


def enable() -> None:
    """From now on in this process, and in those that it starts this way."""
    os.environ.setdefault("CUDA_TILE_TEMP_DIR", tempfile.gettempdir())  # as engines have it
    util.spawnv_passfds = start_process
    psutil.Process.children = children_without_template


def start_process(path: bytes, args: Sequence[str], passfds: Sequence[int]) -> int:
    """Like `multiprocessing.util.spawnv_passfds`."""
    global _template
    if "--multiprocessing-fork" not in args or MARK in os.environ:
        return spawn_program(path, args, passfds)
    with _lock:
        if _template is None or _template.environment != imported_under():
            _template = Template.start()
        return _template.fork(args[args.index("-c") + 1], sorted(set(passfds)))


def children_without_template(process: psutil.Process, recursive: bool = False) -> list[Any]:
    """An engine that ends kills its process's children; the template serves the next engine."""
    own = _template.pid if _template else None
    return [child for child in children_of(process, recursive) if child.pid != own]


def imported_under() -> dict[str, str]:
    """The part of the environment that imported modules may have read."""
    return {name: value for name, value in os.environ.items() if not name.startswith(LATE)}


def adopt_orphans(does: bool) -> None:
    """Whether descendants whose parents end become children of this process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(does), 0, 0, 0)


def serve(descriptor: int) -> str:
    """Of the template. Returns in each process that is forked from it: the program to execute."""
    enable()
    setproctitle(TITLE)
    environment = imported_under()
    for name in IMPORTED:
        importlib.import_module(name)
    assert threading.active_count() == 1, threading.enumerate()
    gc.freeze()
    return serve_from(socket.socket(fileno=descriptor), environment)


def serve_from(connection: socket.socket, environment: dict[str, str]) -> str:
    global _template
    while True:
        request, received, _, _ = socket.recv_fds(connection, LONGEST, 64)
        if not request:
            os._exit(0)
        pid_from, pid_to = os.pipe()
        if between := os.fork():
            os.waitpid(between, 0)
            connection.send(os.read(pid_from, 16))
            for descriptor in (*received, pid_from, pid_to):
                os.close(descriptor)
            continue
        between = os.getpid()
        if child := os.fork():  # ends, and whoever asked becomes the child's parent
            os.write(pid_to, str(child).encode())
            os._exit(0)
        os.close(pid_from)
        os.close(pid_to)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.close()
        if not (pid := os.fork()):  # the child's own template
            for descriptor in (*received, ours.detach()):
                os.close(descriptor)
            connection = theirs
            continue
        setproctitle("python")
        theirs.close()
        _template = Template(ours, pid, environment)
        while os.getppid() == between:
            time.sleep(0.0005)
        return become(request, received)


def become(request: bytes, received: Sequence[int]) -> str:
    """What a spawned process has from its parent; returns the program."""
    program, numbers, environment, folder, cores, mask = pickle.loads(request)
    kept = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, ABOVE_ALL) for number in received]
    for descriptor in received:
        os.close(descriptor)
    if _template and _template.connection.fileno() in numbers:
        moved = fcntl.fcntl(_template.connection, fcntl.F_DUPFD_CLOEXEC, ABOVE_ALL)
        _template.connection = socket.socket(fileno=moved)
    for descriptor, number in zip(kept, numbers, strict=True):
        os.dup2(descriptor, number, inheritable=number in STANDARD)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.sched_setaffinity(0, cores)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    sys.argv = ["-c", "--multiprocessing-fork"]
    if engine := environment.get(ENGINE):
        tie(engine)  # as the first import of SGLang does
    return program
