"""Faults on purpose in an engine under test: forced switches of the mode, declines, late answers,
blocks that arrive with a wrong byte, and prompts that end it.

Ranks are processes of their own. SGLang loads the plugins that it finds on the path in each of
them: inside `disturbed` there is one more, which is `install` below.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orjson
import psutil
import torch

from sidp_sgl.scheduler.control_plane import ControlPlane
from sidp_sgl.scheduler.modes.policy import CAS, WAS, ModePolicy
from sidp_sgl.weightpool.transport.interface import PeerStripe
from sidp_sgl.weightpool.transport.shm.transport import ShmCopyStream

POISONS = ("rank", "raise", "controller", "detokenizer", "engine")
_POISON = "poison: "
_VARIABLE = "SIDP_TEST_DISTURBANCES"
_PLUGIN = {
    "METADATA": "Metadata-Version: 2.1\nName: sidp-disturbances\nVersion: 0\n",
    "entry_points.txt": f"[sglang.srt.plugins]\ndisturbances = {__name__}:install\n",
}


@dataclass(frozen=True)
class Disturbances:
    """Probabilities between 0 and 1; `switch_every` in decode steps, 0 for never; `wrong_owner`:
    the rank whose blocks arrive with a wrong byte, if any."""

    switch_every: int = 0
    decline: float = 0.0
    delay: float = 0.0
    delay_ms: float = 0.0
    seed: int = 0
    wrong_owner: int | None = None


@contextmanager
def disturbed(disturbances: Disturbances) -> Iterator[None]:
    """Engines that are started inside are disturbed so."""
    with (
        tempfile.TemporaryDirectory(prefix="disturbances-") as folder,
        patch.dict(os.environ, {_VARIABLE: orjson.dumps(asdict(disturbances)).decode()}),
    ):
        # A command that is started gets the environment, a spawned process this one's path.
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        plugin = Path(folder, "sidp_disturbances-0.dist-info")
        plugin.mkdir()
        for name, text in _PLUGIN.items():
            (plugin / name).write_text(text)
        sys.path.append(folder)
        try:
            yield
        finally:
            sys.path.remove(folder)


def install() -> None:
    """SGLang's plugin: every control plane that is made in this process is disturbed, and so are
    its copies."""
    original = ControlPlane.__init__

    def disturbed_init(plane: ControlPlane, *args: Any, **kwargs: Any) -> None:
        original(plane, *args, **kwargs)
        if text := os.environ.get(_VARIABLE):
            disturb(plane, Disturbances(**orjson.loads(text)))

    ControlPlane.__init__ = disturbed_init  # type: ignore[method-assign]
    _spoil_copies()
    if scheduler := sys.modules.get("sglang.srt.managers.scheduler"):
        _take_poison(scheduler.Scheduler)


def _spoil_copies() -> None:
    copy = ShmCopyStream._copy

    def spoiled(stream: ShmCopyStream, target: torch.Tensor, source: PeerStripe) -> None:
        copy(stream, target, source)
        text = os.environ.get(_VARIABLE)
        if text and source.owner == Disturbances(**orjson.loads(text)).wrong_owner:
            target[-1] ^= 1

    ShmCopyStream._copy = spoiled  # type: ignore[method-assign]


def poison(kind: str) -> str:
    """A prompt at which a rank ends the engine; `kind` is one of POISONS."""
    return _POISON + kind


def _take_poison(scheduler: Any) -> None:
    handle = scheduler.handle_generate_request

    def handle_or_end(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        text = request.input_text or ""
        if text.startswith(_POISON):
            _end(text.removeprefix(_POISON))
        handle(self, request, *args, **kwargs)

    scheduler.handle_generate_request = handle_or_end


def _end(kind: str) -> None:
    """In a rank: its parent is the DP controller, and that one's the engine's main process."""
    controller = psutil.Process(os.getppid())
    engine = psutil.Process(controller.ppid())
    siblings = {"".join(child.cmdline()[:1]): child for child in engine.children()}
    match kind:
        case "rank":
            os.kill(os.getpid(), signal.SIGKILL)
        case "controller":
            controller.kill()
        case "detokenizer":
            siblings["sglang::detokenizer"].kill()
        case "engine":
            engine.kill()
    raise RuntimeError(f"poisoned by {kind}")


def disturb(plane: ControlPlane, disturbances: Disturbances) -> None:
    if disturbances.switch_every:
        plane.modes.policy = ForcedSwitches(disturbances.switch_every)
    answers, refusal = DisturbedAnswers(disturbances, plane.rank), plane.lease_server.refusal
    plane.lease_server.refusal = lambda: answers.refusal() or refusal()


class DisturbedAnswers:
    """Declines and delays requests at random; called by the lease server's thread."""

    def __init__(self, disturbances: Disturbances, rank: int) -> None:
        self._disturbances = disturbances
        self._random = random.Random(1000 * disturbances.seed + rank)

    def refusal(self) -> str | None:
        if self._random.random() < self._disturbances.delay:
            time.sleep(self._disturbances.delay_ms / 1e3)
        return "disturbed" if self._random.random() < self._disturbances.decline else None


class ForcedSwitches(ModePolicy):
    """Changes the mode every `steps` decode steps, whatever the batch."""

    def __init__(self, steps: int) -> None:
        super().__init__("auto")
        self._steps = steps
        self._count = 0

    def decide(self, batch_size: int, threshold: int | None) -> str:
        wanted = WAS if self._count // self._steps % 2 else CAS
        if self._count and wanted != self.mode:
            self.switches += 1
            self.reasons["forced"] += 1
        self.mode = wanted
        self._count += 1
        return self.mode
