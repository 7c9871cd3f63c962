"""The `sidp` dictionary and the decode log line, on stand-ins for SGLang's objects."""

from types import SimpleNamespace

from sidp_sgl.sglang_hooks.status import StatusHooks


def make_scheduler() -> SimpleNamespace:
    stats = SimpleNamespace(full_available_size=70, full_evictable_size=20)
    return SimpleNamespace(
        max_total_num_tokens=100,
        pool_stats_observer=SimpleNamespace(get_pool_stats=lambda: stats),
        running_batch=SimpleNamespace(reqs=[object()] * 3),
        waiting_queue=[object()],
    )


def test_status_joins_the_pool_with_the_scheduler() -> None:
    hooks = StatusHooks(lambda: {"enabled": True, "was": {"bytes": 0, "stall_seconds": 0.0}})
    for _ in range(5):
        hooks._count_iteration()
    output = SimpleNamespace(internal_state={"version": 1})
    assert hooks._add_status(output, SimpleNamespace(scheduler=make_scheduler())) is output
    sidp = output.internal_state["sidp"]
    assert output.internal_state["version"] == 1 and sidp["enabled"]
    assert sidp["kv_capacity_tokens"] == 100 and sidp["kv_headroom_tokens"] == 90
    assert sidp["running_batch_size"] == 3 and sidp["waiting_requests"] == 1
    assert sidp["iterations"] == {"was": 5, "cas": 0}


def test_log_part_tells_what_happened_since_the_last_line() -> None:
    was = {"bytes": 2_000_000, "stall_seconds": 0.001}
    hooks = StatusHooks(lambda: {"was": was})
    assert hooks._add_log_part(["#token: 1"]) == [
        "#token: 1",
        "sidp: was, fetched 2.0 MB, stalled 1.0 ms",
    ]
    was.update(bytes=5_000_000, stall_seconds=0.0015)
    assert hooks._add_log_part([])[0] == "sidp: was, fetched 3.0 MB, stalled 0.5 ms"
