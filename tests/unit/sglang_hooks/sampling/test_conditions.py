"""What `auto` comes to, and what is refused where sequence-parallel sampling is asked for: in one
line, before anything is started."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt import models
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import ServerArgs

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.sglang_hooks import arguments
from sidp_sgl.sglang_hooks.sampling import conditions
from sidp_sgl.sglang_hooks.sampling.conditions import EDITING_MODELS, RULES, obstacle
from tests.support.checkpoints import write_checkpoint

DEFAULTS = {
    **{rule.field: None for rule in RULES},
    **{"tp_size": 2, "pp_size": 1, "attn_cp_size": 1, "device": "cpu"},
    **{"disaggregation_mode": "null", "sampling_backend": "flashinfer"},
}
BAD = [
    ({"tp_size": 1}, "--tp-size 2 or more, got 1"),
    ({"pp_size": 2}, "--pp-size 2"),
    ({"attn_cp_size": 2}, "--attn-cp-size 2"),
    ({"enable_dp_attention": True}, "--enable-dp-attention"),
    ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm NGRAM"),
    ({"dllm_algorithm": "LowConfidence"}, "--dllm-algorithm"),
    ({"disaggregation_mode": "decode"}, "--disaggregation-mode decode"),
    ({"enable_torch_compile": True}, "--enable-torch-compile"),
    ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap"),
    ({"sampling_backend": "ascend"}, "--sampling-backend ascend"),
    ({"device": "npu"}, "--device npu"),
]


@pytest.mark.parametrize(("changes", "text"), BAD, ids=lambda value: str(value)[:30])
def test_an_obstacle_is_named_with_its_remedy(changes: dict[str, Any], text: str) -> None:
    reason = obstacle(SimpleNamespace(**{**DEFAULTS, **changes}))
    assert reason is not None and text in reason and "\n" not in reason
    assert any(word in reason for word in ("drop", "needs"))


def test_none_is_in_the_way() -> None:
    assert obstacle(SimpleNamespace(**DEFAULTS)) is None
    assert obstacle(SimpleNamespace(**{**DEFAULTS, "sampling_backend": "pytorch"})) is None
    assert obstacle(SimpleNamespace(**{**DEFAULTS, "device": "cuda"})) is None


def test_every_rule_has_a_case_and_a_field_of_sglang_s() -> None:
    fields = {rule.field for rule in RULES}
    assert fields <= {name for changes, _ in BAD for name in changes}
    assert fields <= set(ServerArgs.__struct_fields__)


def test_models_that_edit_logits_get_whole_rows() -> None:
    reason = obstacle(SimpleNamespace(**DEFAULTS), lambda: ["Other", *EDITING_MODELS])
    assert reason is not None and min(EDITING_MODELS) in reason and "drop it" in reason
    assert obstacle(SimpleNamespace(**DEFAULTS), lambda: ["LlamaForCausalLM"]) is None


def test_these_are_all_models_of_sglang_s_that_edit_logits() -> None:
    """The others that name them are drafts, or stand for SGLang's logits processor."""
    files = {
        file.stem
        for file in Path(models.__path__[0]).glob("*.py")
        if re.search(r"\w\.next_token_logits", file.read_text())
    }
    assert files == {"gemma4_unified"}


class StartedError(Exception):
    """Processes were about to be started, with these arguments."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama", num_layers=2)


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(server_args: Any, *_: Any, **__: Any) -> None:
        raise StartedError(server_args)

    monkeypatch.setattr(Engine, "_launch_scheduler_processes", launch)


@pytest.fixture
def start(checkpoint: Path) -> Any:
    def run(**keywords: Any) -> str | None:
        """What the ranks would be told."""
        defaults = {"device": "cpu", "skip_tokenizer_init": True}
        with pytest.raises(StartedError) as started:
            Engine(model_path=str(checkpoint), **{**defaults, **keywords})
        return arguments.sampling_of(started.value.args[0])

    return run


def test_auto_shares_the_sampling_where_it_can(start: Any) -> None:
    assert start(tp_size=2, sidp_sampling="auto") == "sequence-parallel"
    assert start(tp_size=2, dp_size=2, sidp_sampling="auto") == "sequence-parallel"
    assert start(tp_size=1, sidp_sampling="auto") is None
    assert start(tp_size=2, pp_size=2, sidp_sampling="auto") is None


def test_auto_does_not_share_on_gpus_yet(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "SHARES_BY_ITSELF", ())
    assert start(tp_size=2, sidp_sampling="auto") is None
    assert start(tp_size=2, sidp_sampling="sequence-parallel") == "sequence-parallel"
    monkeypatch.undo()
    assert "cuda" not in conditions.SHARES_BY_ITSELF


def test_nothing_changes_unless_it_is_asked_for(start: Any) -> None:
    assert start(tp_size=2) is None
    assert start(tp_size=2, sidp_sampling="replicated") is None
    assert start(dp_size=2, sidp=True) is None, "one TP rank has nobody to share with"


@pytest.mark.parametrize(
    ("keywords", "text"),
    [({}, "needs --tp-size 2 or more"), ({"tp_size": 2, "pp_size": 2}, "drop one of them")],
)
def test_what_was_asked_for_and_can_t_be_is_refused(
    checkpoint: Path, keywords: dict[str, Any], text: str
) -> None:
    with pytest.raises(SidpUsageError) as refused:
        Engine(
            model_path=str(checkpoint),
            device="cpu",
            skip_tokenizer_init=True,
            sidp_sampling="sequence-parallel",
            **keywords,
        )
    assert str(refused.value).startswith("--sidp-sampling sequence-parallel ")
    assert text in str(refused.value) and "\n" not in str(refused.value)
