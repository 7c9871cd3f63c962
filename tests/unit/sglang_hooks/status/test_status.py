"""The `sidp` dictionary and the decode log line, on stand-ins for SGLang's objects."""

from types import SimpleNamespace
from typing import Any

from sidp_sgl.sglang_hooks.status.status import StatusHooks


def make_scheduler() -> SimpleNamespace:
    stats = SimpleNamespace(full_available_size=70, full_evictable_size=20)
    return SimpleNamespace(
        max_total_num_tokens=100,
        pool_stats_observer=SimpleNamespace(get_pool_stats=lambda: stats),
        running_batch=SimpleNamespace(reqs=[object()] * 3),
        waiting_queue=[object()],
    )


class RankStatus:
    """What a rank says of itself; `cas` has no rows where every step streams weights."""

    def __init__(self, mode: str = "was", **cas: float) -> None:
        self.was = {"bytes": 0, "stall_seconds": 0.0}
        self.cas: dict[str, Any] = cas
        self.iterations = {"was": 0, "cas": 0}
        self.mode = mode

    def __call__(self) -> dict[str, Any]:
        return {
            "enabled": True,
            "mode": self.mode,
            "iterations": self.iterations,
            "was": self.was,
            "cas": self.cas,
        }


def test_status_joins_the_rank_with_the_scheduler() -> None:
    status = RankStatus()
    status.iterations["was"] = 5
    hooks = StatusHooks(status)
    output = SimpleNamespace(internal_state={"version": 1})
    assert hooks._add_status(output, SimpleNamespace(scheduler=make_scheduler())) is output
    sidp = output.internal_state["sidp"]
    assert output.internal_state["version"] == 1 and sidp["enabled"]
    assert sidp["kv_capacity_tokens"] == 100 and sidp["kv_headroom_tokens"] == 90
    assert sidp["running_batch_size"] == 3 and sidp["waiting_requests"] == 1
    assert sidp["mode"] == "was" and sidp["iterations"] == {"was": 5, "cas": 0}


def test_log_part_tells_what_happened_since_the_last_line() -> None:
    status = RankStatus()
    hooks = StatusHooks(status)
    status.was.update(bytes=2_000_000, stall_seconds=0.001)
    assert hooks._add_log_part(["#token: 1"]) == [
        "#token: 1",
        "sidp: was, fetched 2.0 MB, stalled 1.0 ms",
    ]
    status.was.update(bytes=5_000_000, stall_seconds=0.0015)
    assert hooks._add_log_part([])[0] == "sidp: was, fetched 3.0 MB, stalled 0.5 ms"


def test_log_part_tells_of_cas_where_there_was_some() -> None:
    status = RankStatus("cas", rows_sent=0, rows_served=0, wait_seconds=0.0)
    hooks = StatusHooks(status)
    assert hooks._add_log_part([])[0] == "sidp: cas, fetched 0.0 MB, stalled 0.0 ms"
    status.iterations["cas"] = 40
    status.cas.update(rows_sent=640, wait_seconds=0.0123)
    assert hooks._add_log_part([])[0] == (
        "sidp: cas, fetched 0.0 MB, stalled 0.0 ms, 40 CaS steps, sent 640 rows, waited 12.3 ms"
    )
    status.iterations["cas"] = 43
    status.cas.update(rows_sent=670, wait_seconds=0.0133, rows_served=9)
    assert hooks._add_log_part([])[0] == (
        "sidp: cas, fetched 0.0 MB, stalled 0.0 ms, 3 CaS steps, sent 30 rows, waited 1.0 ms, "
        "served 9 rows"
    )
    status.cas["rows_served"] = 12
    status.mode = "was"
    assert hooks._add_log_part([])[0] == (
        "sidp: was, fetched 0.0 MB, stalled 0.0 ms, served 3 rows"
    )
