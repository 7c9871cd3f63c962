"""With --sidp-calibration the threshold follows from the file, by the planner's model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sidp_sgl.config import SidpConfig, SidpUsageError
from sidp_sgl.sglang_hooks.modes import ModeHooks
from sidp_sgl.sglang_hooks.planned_times import planned_times
from tests.support.machines import LAYERS, MODEL, write_calibration


class Config:
    """SGLang's hf_config, as far as it is asked."""

    def __init__(self, **change: Any) -> None:
        self._values = {**MODEL, **change}

    def to_dict(self) -> dict[str, Any]:
        return self._values


def config_with(path: Path, **values: Any) -> SidpConfig:
    return SidpConfig.from_values({"sidp": True, "sidp_calibration": str(path), **values})


def test_nothing_without_the_flag() -> None:
    assert planned_times(SidpConfig.from_values({"sidp": True}), Config(), 2) is None


@pytest.mark.parametrize("wanted", [2, 7, 40, 64])
def test_the_threshold_is_that_of_the_file(tmp_path: Path, wanted: int) -> None:
    path = write_calibration(tmp_path, threshold=wanted)
    times = planned_times(config_with(path), Config(), 2)
    assert times is not None and times.threshold(64) == wanted


def test_the_link_is_the_slower_one_of_file_and_flag(tmp_path: Path) -> None:
    path = write_calibration(tmp_path, threshold=16)
    plain, paced, faster = (
        planned_times(config_with(path, sidp_link_gbps=gbps), Config(), 2)
        for gbps in (None, 1e-3, 1e15)
    )
    assert plain and paced and faster
    fetched = LAYERS // 2 * 3 * MODEL["hidden_size"] * MODEL["intermediate_size"] * 2  # bytes
    assert paced.fetch_seconds - plain.fetch_seconds == pytest.approx(fetched / 1e6)
    assert faster.fetch_seconds == plain.fetch_seconds


def test_more_slots_and_ranks_count(tmp_path: Path) -> None:
    path = write_calibration(tmp_path, threshold=16)
    resident = config_with(path, sidp_cache_slots=LAYERS // 2)
    times = planned_times(resident, Config(), 2)
    assert times is not None and times.fetch_seconds == 0
    four = planned_times(config_with(path, sidp_cache_slots=1), Config(), 4)
    two = planned_times(config_with(path, sidp_cache_slots=1), Config(), 2)
    assert four and two and four.fetch_seconds == pytest.approx(1.5 * two.fetch_seconds)


def test_a_model_that_the_planner_does_not_know(tmp_path: Path) -> None:
    path = write_calibration(tmp_path, threshold=16)
    with pytest.raises(SidpUsageError, match="--sidp-calibration does not go with") as raised:
        planned_times(config_with(path), Config(model_type="gpt2"), 2)
    assert "\n" not in str(raised.value)


def test_a_rank_begins_with_the_file_and_measures_nothing(tmp_path: Path) -> None:
    path = write_calibration(tmp_path, threshold=9)
    times = planned_times(config_with(path), Config(), 2)
    modes = SimpleNamespace(times=None)
    control: Any = SimpleNamespace(modes=modes)
    pool: Any = SimpleNamespace(rank=0)
    execution: Any = SimpleNamespace(remote=object())
    hooks = ModeHooks(control, pool, execution, planned_times=times)
    hooks._calibrate(None, scheduler=None)  # type: ignore[call-arg]
    assert modes.times is times and modes.times.threshold(64) == 9
