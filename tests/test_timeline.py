"""What a run's start was made of is written where it is asked for, and nowhere else."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from fedlora.timeline import FILE, phase


def test_phases_are_appended_from_the_inside_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "timeline.jsonl"
    monkeypatch.setenv(FILE, str(file))

    @phase("outer")
    def run(x: int) -> int:
        with phase("inner"):
            return x + 1

    before = time.time()
    assert (run(1), run(2)) == (2, 3)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["inner", "outer"] * 2
    inner, outer, *_ = lines
    assert before <= outer["began"] <= inner["began"] <= inner["ended"] <= outer["ended"] <= time.time()
    assert {line["process"] for line in lines} == {os.getpid()}


def test_a_phase_that_fails_is_written_too_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE, str(tmp_path / "t"))
    with pytest.raises(ValueError, match="out of luck"), phase("broken"):
        raise ValueError("out of luck")
    assert json.loads((tmp_path / "t").read_text())["phase"] == "broken"


def test_without_the_variable_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    with phase("quiet"):
        pass
    assert list(tmp_path.iterdir()) == []
