"""The status of a rank as SGLang shows it, on stand-ins for SGLang's objects."""

import pkgutil
from dataclasses import asdict
from types import SimpleNamespace

from sidp_sgl.sglang_hooks.status.server_info import ServerInfo, follower_hook
from tests.support.statuses import make_status

MEMBERS = [{"tp_rank": 0}, {"tp_rank": 1}]
STATUS = make_status(kv_capacity_tokens=100, iterations={"was": 5})


def test_the_status_joins_sglangs_own() -> None:
    output = SimpleNamespace(internal_state={"version": 1})
    assert ServerInfo(lambda: STATUS, lambda: MEMBERS)._add_status(output, "controller") is output
    assert output.internal_state == {"version": 1, "sidp": {**asdict(STATUS), "members": MEMBERS}}
    assert output.internal_state["sidp"]["iterations"] == {"was": 5, "cas": 0, "local": 0}


def test_tp_ranks_above_0_take_part() -> None:
    asked: list[str] = []
    output = SimpleNamespace(internal_state={"version": 1})
    hook = follower_hook(lambda: asked.append("members"))
    assert hook.function(output, "controller") is output and asked == ["members"]
    assert output.internal_state == {"version": 1}
    assert callable(pkgutil.resolve_name(hook.target))


def test_the_log_line_gets_a_part() -> None:
    parts = ServerInfo(lambda: STATUS, lambda: MEMBERS)._add_log_part(["#token: 1"], "pool stats")
    assert parts == ["#token: 1", "sidp: was, fetched 0.0 MB, stalled 0.0 ms"]


def test_every_hook_has_its_place_in_sglang() -> None:
    for target, _, _ in ServerInfo(lambda: STATUS, lambda: MEMBERS).hooks():
        assert callable(pkgutil.resolve_name(target))
