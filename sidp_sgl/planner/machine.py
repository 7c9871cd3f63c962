"""What a GPU reaches in practice: the constants of the time model, all in this one place.

Fractions of the peak are the same for every GPU, model and figure; a calibration file replaces them
by what was measured on the machine at hand.
"""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.planner.gpus import Gpu

HBM_FRACTION = 0.85  # weights streamed by a GEMM
KV_FRACTION = 0.75  # of the HBM bandwidth; keys and values lie in scattered pages
COMPUTE_FRACTION = 0.75  # of the dense peak, in a large GEMM
LINK_FRACTION = 0.80  # copies between GPUs, all of them at the same time
KERNEL_SECONDS = 3e-6  # launch gap and tail of a kernel within a CUDA graph
LAYER_SECONDS = 10e-6  # norms, rotary embedding, activation: what is not a GEMM or attention
COLLECTIVE_SECONDS = 10e-6  # of an all-reduce, beyond its bytes
COPY_SECONDS = 10e-6  # of a fetch, beyond its bytes
ROUND_TRIP_SECONDS = 20e-6  # of a remote unit, beyond its rows and its GEMM
STEP_SECONDS = 1e-3  # sampling, and the scheduler where the overlap does not hide it
EAGER_LAYER_SECONDS = 400e-6  # the host's, to launch a layer's 20 or so kernels without a graph
RESERVED_BYTES = 1 << 30  # CUDA context and communication buffers
_MOST = float("inf")


@dataclass(frozen=True)
class Machine:
    """Achievable rates of one GPU (or CPU rank) of a node: bytes, FLOP per second, seconds."""

    name: str
    memory_bytes: int  # what SGLang finds free before it loads weights
    hbm_bandwidth: float
    kv_bandwidth: float
    bf16_flops: float
    fp8_flops: float
    link_bandwidth: float  # per direction; an owner's egress, shared by its readers
    kernel_seconds: float
    layer_seconds: float
    collective_seconds: float
    copy_seconds: float
    round_trip_seconds: float
    step_seconds: float
    # What only some machines have; nothing of it is assumed of a GPU that was not measured.
    request_seconds: float = 0.0  # of a step, for each request: sampling, bookkeeping
    attention_request_seconds: float = 0.0  # of a layer, for each request, beyond its bytes
    row_bandwidth: float = 0.0  # of rows sent or summed, which no pace slows down; 0: the link's
    copy_share: float = 0.0  # of the compute's time, lost while a fetch is under way

    @classmethod
    def from_gpu(cls, gpu: Gpu) -> "Machine":
        """From the vendor's peaks. Where there is no FP8 arithmetic, FP8 weights run as BF16."""
        return cls(
            name=gpu.name,
            memory_bytes=int(gpu.memory_gb * 1e9) - RESERVED_BYTES,
            hbm_bandwidth=gpu.hbm_gbps * 1e9 * HBM_FRACTION,
            kv_bandwidth=gpu.hbm_gbps * 1e9 * KV_FRACTION,
            bf16_flops=gpu.bf16_tflops * 1e12 * COMPUTE_FRACTION,
            fp8_flops=(gpu.fp8_tflops or gpu.bf16_tflops) * 1e12 * COMPUTE_FRACTION,
            link_bandwidth=gpu.link_gbps * 1e9 * LINK_FRACTION,
            kernel_seconds=KERNEL_SECONDS,
            layer_seconds=LAYER_SECONDS,
            collective_seconds=COLLECTIVE_SECONDS,
            copy_seconds=COPY_SECONDS,
            round_trip_seconds=ROUND_TRIP_SECONDS,
            step_seconds=STEP_SECONDS,
        )

    @classmethod
    def from_json(cls, path: str | Path, flag: str = "--calibration") -> "Machine":
        """From a calibration file, which has this class's fields under "machine".

        Raises SidpUsageError in one line, which names the `flag`.
        """
        try:
            content = json.loads(Path(path).read_text())
            values = content["machine"]
            machine = cls(**values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SidpUsageError(
                f"{flag} {path} is no calibration file ({error}): write one with sidp-sgl calibrate"
            ) from error
        for field in fields(cls)[1:]:
            value = getattr(machine, field.name)
            may_be_zero = field.name.endswith("seconds") or field.default is not MISSING
            if not _is_in_range(value, may_be_zero, 1.0 if field.name == "copy_share" else _MOST):
                raise SidpUsageError(
                    f"{flag} {path}: {field.name} {value!r} is out of range: measure again "
                    "with sidp-sgl calibrate"
                )
        return machine

    def as_json(self) -> dict[str, dict[str, float | str]]:
        """What `from_json` reads."""
        return {"machine": asdict(self)}

    def flops(self, dtype: str) -> float:
        return self.fp8_flops if dtype == "fp8" else self.bf16_flops


def _is_in_range(value: object, may_be_zero: bool, most: float) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value < most or (value == 0 and may_be_zero)
