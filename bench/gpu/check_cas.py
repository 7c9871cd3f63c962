"""CaS on the GPU: the right rows between processes, and the time of a round trip within one, where
two ranks' kernels really run at the same time."""

import os
import time
from typing import Any

import torch
from torch.nn import functional

from bench.gpu.device import Gpu
from bench.gpu.models import DECODERS, scaled
from bench.gpu.ranks import Rank, run_ranks
from sidp_sgl.weightpool.cas.endpoint import CasEndpoint
from sidp_sgl.weightpool.cas.staging import make_staging
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowType
from sidp_sgl.weightpool.transport.cuda.mailbox import CudaMailbox

ROUND_TRIP_TARGET = 20e-6  # seconds beyond the GEMM
_STEPS, _WIDTH = 100, 256
_CALLS = 20  # in a graph


def _unit(number: int, width: int, dtype: torch.dtype, compute: Any) -> PooledUnit:
    row = RowType(width, dtype)
    return PooledUnit(number, number, True, (row,), row, compute, compute)


def _whole_numbers(gpu: Gpu, seed: int, rows: int) -> torch.Tensor:
    """[rows, width] float32 whose products and sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (rows, _WIDTH), generator=generator).float().to(gpu.device)


def _correct(rank: Rank, gpu: Gpu) -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = False
    weights = [_whole_numbers(gpu, 100 + number, _WIDTH) for number in range(rank.num_ranks)]
    units = [
        _unit(number, _WIDTH, torch.float32, lambda rows, w=weight: rows @ w)
        for number, weight in enumerate(weights)
    ]
    staging = make_staging((unit.row_bytes for unit in units), rank.num_ranks)
    calls = CudaMailbox(gpu.driver(), rank.number, staging)
    for peer, (_, descriptors) in rank.exchange(None, calls.export()).items():
        calls.connect(peer, descriptors)
    endpoint = CasEndpoint(calls, staging, [units[rank.number]])
    requester = endpoint.requester
    endpoint.service.start()
    rank.barrier()
    owners = [owner for owner in range(rank.num_ranks) if owner != rank.number]
    wrong, seconds = 0, 0.0
    for step in range(_STEPS):
        num_rows = 1 + step % 9
        requester.begin_step(num_rows)
        for owner in owners:
            rows = _whole_numbers(gpu, 10 * step + rank.number, num_rows)
            gpu.synchronize()
            started = time.perf_counter()
            result = requester.call([owner], units[owner], [rows])
            seconds += time.perf_counter() - started
            wrong += result is None or not torch.equal(result, rows @ weights[owner])
        requester.end_step()
    seconds /= _STEPS * len(owners)
    rank.barrier()
    counters = endpoint.counters()
    endpoint.service.close()
    rank.barrier()
    calls.close()
    served, sent = counters["rows_served"], counters["rows_sent"]
    return {"wrong": wrong, "sent": sent, "served": served, "seconds_per_call": seconds}


def correct(gpu: Gpu) -> dict[str, Any]:
    """Three ranks send rows to each other, each serving while it sends."""
    ranks = run_ranks(gpu, 3, _correct)
    sent, served = (sum(rank[name] for rank in ranks) for name in ("sent", "served"))
    return {
        "wrong": [rank["wrong"] for rank in ranks],
        "rows_sent": sent,
        "rows_served": served,
        "seconds_per_call": max(rank["seconds_per_call"] for rank in ranks),
        "ok": not any(rank["wrong"] for rank in ranks) and sent == served > 0,
        "note": "processes on one GPU take turns on it: the time is not that of two GPUs",
    }


def _ffn(gpu: Gpu) -> tuple[int, Any]:
    decoder = scaled(DECODERS[0], gpu.scale)
    shape = 2 * decoder.intermediate, decoder.hidden
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": gpu.device}
    up = torch.randn(*shape, **options) * 0.02
    down = torch.randn(decoder.hidden, decoder.intermediate, **options) * 0.02

    def compute(rows: torch.Tensor) -> torch.Tensor:
        gate, value = functional.linear(rows, up).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * value, down)

    return decoder.hidden, compute


def _remote(gpu: Gpu, width: int, compute: Any, rows: torch.Tensor) -> tuple[float, bool]:
    """Seconds of a call between two ends of this process, and whether its result is right."""
    unit = _unit(0, width, torch.bfloat16, compute)
    staging = make_staging([unit.row_bytes], 2)
    ends = [CudaMailbox(gpu.driver(), number, staging) for number in range(2)]
    for number, end in enumerate(ends):
        end.connect(1 - number, [os.dup(fd) for fd in ends[1 - number].export()])
    requester, owner = (
        CasEndpoint(end, staging, owned) for end, owned in zip(ends, ([], [unit]), strict=True)
    )
    owner.service.start()
    requester.requester.begin_step(len(rows))
    times, result = [], None
    for _ in range(50):
        started = time.perf_counter()
        result = requester.requester.call([1], unit, [rows])
        gpu.synchronize()
        times.append(time.perf_counter() - started)
    is_right = result is not None and torch.allclose(result, compute(rows), rtol=0.05, atol=0.05)
    owner.service.close()
    for end in ends:
        end.close()
    return sorted(times)[len(times) // 2], is_right


def _here(gpu: Gpu, compute: Any, rows: torch.Tensor) -> float:
    """Seconds of the same computed here, from a graph of several."""

    def several() -> None:
        for _ in range(_CALLS):
            compute(rows)

    return gpu.seconds(gpu.capture(several)) / _CALLS


def round_trip(gpu: Gpu) -> dict[str, Any]:
    """One FFN of Qwen3-32B computed by its owner, beside the same computed here."""
    with torch.inference_mode():
        width, compute = _ffn(gpu)
        result: dict[str, Any] = {"microseconds": {}}
        is_right, beyond = True, []
        for num_rows in (1, 16, 64):
            rows = torch.randn(num_rows, width, dtype=torch.bfloat16, device=gpu.device)
            here = _here(gpu, compute, rows)
            remote, right = _remote(gpu, width, compute, rows)
            is_right = is_right and right
            beyond.append(remote - here)
            times = {"computed here": here, "by its owner": remote}
            result["microseconds"][f"{num_rows} rows"] = {
                name: round(1e6 * seconds, 1) for name, seconds in times.items()
            }
    target_met = max(beyond) <= ROUND_TRIP_TARGET
    return {
        **result,
        "target": f"at most {1e6 * ROUND_TRIP_TARGET:.0f} us beyond the GEMM",
        "target_met": target_met,
        "ok": is_right,
        "note": "two streams of one process",
    }
