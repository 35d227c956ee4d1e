"""What summary.json says of the code that ran."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fedlora.strategies import summary


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree without git, as if the code ran from there; the environment names a commit."""
    monkeypatch.setattr(summary, "__file__", str(tmp_path / "strategies" / "summary.py"))
    monkeypatch.setenv("FEDLORA_COMMIT", "c0ffee")
    return tmp_path


def test_outside_of_a_checkout_the_environment_says_the_commit(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert summary._commit() == "c0ffee"
    monkeypatch.setenv("FEDLORA_COMMIT", "")
    assert summary._commit() is None
    monkeypatch.delenv("FEDLORA_COMMIT")
    assert summary._commit() is None


def test_a_checkout_says_its_own_commit(tree: Path) -> None:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tree, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    git("init")
    (tree / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert summary._commit() == commit
    (tree / "file").write_text("2")
    assert summary._commit() == commit  # the process has imported what was there
    summary._described.cache_clear()
    assert summary._commit() == f"{commit}-dirty"
