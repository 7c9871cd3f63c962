"""bench.versions without engines: the other version's tree, and what it says of the rounds."""

import subprocess
from pathlib import Path

import pytest

from bench import versions
from bench.versions import Taken, checked_out, git, result_of


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of one file; the working tree has the second."""
    root = tmp_path / "repository"
    root.mkdir()
    monkeypatch.setattr(versions, "ROOT", root)
    git("init", "--quiet")
    for text in ("old", "new"):
        (root / "file").write_text(text)
        git("add", "file")
        git("-c", "user.name=A", "-c", "user.email=a@b", "commit", "--quiet", "-m", text)
    return root


def test_the_other_version_is_there_until_the_run_ends(repository: Path) -> None:
    with checked_out("HEAD~1") as tree:
        assert (tree / "file").read_text() == "old"
        assert (repository / "file").read_text() == "new"
    assert not tree.parent.exists()
    assert git("worktree", "list").count("\n") == 0


def test_it_goes_however_the_run_ends(repository: Path) -> None:
    with pytest.raises(KeyboardInterrupt), checked_out("HEAD~1") as tree:
        (tree / "file").write_text("changed")
        raise KeyboardInterrupt
    assert not tree.parent.exists()
    assert git("worktree", "list").count("\n") == 0
    with pytest.raises(subprocess.CalledProcessError), checked_out("no-such-commit"):
        pass


def test_the_median_over_all_rounds_decides() -> None:
    def rounds(*ratios: float) -> list[dict[str, Taken]]:
        return [{"base": Taken(10.0, 20.0), "new": Taken(10.0 * r, 22.0)} for r in ratios]

    result = result_of("step", [rounds(0.9, 1.02), rounds(1.03, 1.5, 2.0)])
    assert result["new_over_base"]["median"] == pytest.approx(1.03)
    assert result["of_each_start"] == pytest.approx([0.96, 1.5])
    assert result["processors_new_over_base"]["max"] == pytest.approx(1.1)
    assert result["base"]["median"] == 10.0
    assert result_of("step", [rounds(1.0, 1.02, 9.0)])["passes"]
    assert not result_of("step", [rounds(1.0, 1.04, 1.05)])["passes"]
    heads, rows = versions.table({"measured": {"was": result}})
    assert len(rows[0]) == len(heads) and rows[0][3] == "1.03 (0.90 to 2.00)"
