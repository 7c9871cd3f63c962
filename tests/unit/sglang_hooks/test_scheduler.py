"""What happens around SGLang's scheduler, and in which order, on stand-ins."""

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks.scheduler import SchedulerHooks

SCHEDULER = SimpleNamespace(metrics_collector=SimpleNamespace(labels="labels"))


class Rank:
    """Notes what the hooks ask of its parts."""

    def __init__(self, *, has_metrics: bool = True, has_lender: bool = True) -> None:
        self.log: list[Any] = []
        self.pool: Any = SimpleNamespace(is_started=True)
        reports: Any = SimpleNamespace(errors=self.errors, pooled=self.note("pooled"))
        waiting: Any = SimpleNamespace(
            count=self.note("count"), pick=self.note("pick"), handle_give_back=self.note("handle")
        )
        steps: Any = SimpleNamespace(
            calibrate=self.note("calibrate"),
            publish=self.note("publish"),
            run_batch=self.note("step"),
        )
        self_check: Any = SimpleNamespace(
            check_blocks=self.note("blocks"),
            check_calls=self.note("calls"),
            before_step=self.note("before step"),
        )
        metrics: Any = SimpleNamespace(publish_each_second=self.note("metrics"))
        lender: Any = SimpleNamespace(tick=self.note("tick"), saw_prefill=self.note("saw"))
        self.hooks = SchedulerHooks(
            reports,
            self.pool,
            waiting,
            steps,
            self_check,
            self.note("say"),
            metrics if has_metrics else None,
            lender if has_lender else None,
        )

    def note(self, name: str) -> Any:
        return lambda *args, **kwargs: self.log.append((name, *args, *kwargs.values()))

    @contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.log.append(error)


def test_every_hook_has_a_place_of_its_own_in_sglang() -> None:
    targets = [hook.target for hook in Rank().hooks.hooks()]
    assert len(set(targets)) == len(targets)
    assert all(callable(pkgutil.resolve_name(target)) for target in targets)


def test_a_rank_has_started_when_it_has_checked_and_measured() -> None:
    rank = Rank()
    rank.hooks._init(rank.note("init"), SCHEDULER, "arguments", port_args="ports")
    assert rank.log == [
        ("init", SCHEDULER, "arguments", "ports"),
        ("handle", SCHEDULER),
        ("blocks",),
        ("calibrate", SCHEDULER),
        ("calls",),
        ("say",),
        ("pooled",),
    ]
    assert rank.hooks.scheduler is SCHEDULER


def test_a_rank_without_a_pool_has_not_started() -> None:
    rank = Rank()
    rank.pool.is_started = False
    rank.hooks._init(rank.note("init"), SCHEDULER)
    _, error = rank.log
    assert isinstance(error, SidpError) and "past the weight pool" in str(error)


@pytest.mark.parametrize(("is_extend", "has_lender"), [(False, True), (True, True), (True, False)])
def test_the_self_check_goes_on_between_steps(is_extend: bool, has_lender: bool) -> None:
    rank = Rank(has_lender=has_lender)
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: is_extend))
    rank.hooks._run_batch("original", SCHEDULER, batch, pp_proxy_tensors=None)
    assert rank.log == [
        ("before step",),
        *([("saw", batch)] if is_extend and has_lender else []),
        ("step", "original", SCHEDULER, batch, None),
    ]


@pytest.mark.parametrize("has_lender", [True, False])
@pytest.mark.parametrize("has_metrics", [True, False])
def test_requests_are_counted_before_the_state_is_published(
    has_metrics: bool, has_lender: bool
) -> None:
    rank = Rank(has_metrics=has_metrics, has_lender=has_lender)
    assert rank.hooks._after_ingest(["request"], SCHEDULER, stop_at_pause=False) == ["request"]
    assert rank.log == [
        ("count", ["request"], SCHEDULER),
        ("publish", SCHEDULER),
        *([("tick", SCHEDULER)] if has_lender else []),
        *([("metrics", "labels")] if has_metrics else []),
    ]


def test_an_error_of_the_event_loop_is_reported() -> None:
    rank = Rank()

    def fails(scheduler: Any) -> None:
        raise RuntimeError("out of memory")

    rank.hooks._run_event_loop(fails, SCHEDULER)
    assert [str(error) for error in rank.log] == ["out of memory"]
