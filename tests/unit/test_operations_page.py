"""docs/operations.md has every error and log line of an engine with --sidp, word for word."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import sidp_sgl
from sidp_sgl.sglang_hooks.refusals import RULES, TP_RULES
from sidp_sgl.sglang_hooks.sampling.conditions import RULES as SAMPLING_RULES

PACKAGE = Path(sidp_sgl.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "operations.md").read_text()
WORDS = " ".join(PAGE.replace("`", "").split())
# Commands of their own, with pages of their own.
ELSEWHERE = {"planner", "batch"}
ERRORS = {
    *("SidpUsageError", "SidpError", "RankFailure", "RendezvousError", "TransportError"),
    *("UpdateRejected", "CallRefused"),
}
MIN_LENGTH = 8  # a shorter piece says nothing
# What a request may get; elsewhere a ValueError is no user's.
REQUESTS = "request_checks.py"
LOGS = {"logger.info", "logger.warning", "logger.error", "logger.exception"}


def longest_text(node: ast.expr) -> str:
    """The longest piece of a message that is the same every time."""
    pieces = [
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    texts = [text for piece in pieces for text in re.split(r"%[.\d]*[dfs]", piece)]
    return max((" ".join(text.split()) for text in texts), key=len, default="")


def messages() -> Iterator[tuple[str, str]]:
    """(where, longest text) of every error and log line."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] in ELSEWHERE:
            continue
        named = ERRORS | LOGS | ({"ValueError"} if path.name == REQUESTS else set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                if ast.unparse(node.func).rpartition("(")[0] or ast.unparse(node.func) not in named:
                    continue
                text = longest_text(node.args[0])
                if len(text) >= MIN_LENGTH:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def test_every_message_is_on_the_page() -> None:
    missing = {where: text for where, text in messages() if text.replace("`", "") not in WORDS}
    assert not missing
    assert len(list(messages())) > 40


def test_every_refused_flag_is_on_the_page() -> None:
    every = [*RULES, *TP_RULES, *SAMPLING_RULES]
    assert not [rule.flag for rule in every if f"`{rule.flag}`" not in PAGE]
