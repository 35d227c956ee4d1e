"""What a run's start was made of is written where it is asked for, and nowhere else."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from fedlora.status import DOING, read_written, written
from fedlora.timeline import FILE, Phase, active, describe, format_clock, format_seconds, phase


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


def test_active_phases_are_described_from_the_outside_in() -> None:
    assert describe() == ""
    with (
        phase("a", "rounds", 8, 2) as rounds,
        phase("hidden"),
        phase("b", "training", detail=lambda: "local steps 3/4"),
    ):
        assert describe() == "rounds 2/8, training: local steps 3/4"
        assert active()[0] is rounds
    assert describe() == ""


def test_a_phase_that_fails_is_over() -> None:
    with pytest.raises(ValueError, match="no"), phase("a", "outer"):
        raise ValueError("no")
    assert active() == []


def test_what_is_left_is_estimated_from_what_was_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that were done before the phase began, as in a resumed run, took no time of it."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    resumed = Phase("rounds", 20, 10)
    now = 130.0
    assert resumed.left is None
    assert resumed.describe() == "rounds 10/20 (0:30)"
    resumed.advance(2)
    assert resumed.left == pytest.approx(120.0)
    assert resumed.describe() == "rounds 12/20 (2 min left)"
    resumed.done = 20
    assert resumed.describe() == "rounds 20/20 (0:30)"


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (7200, "2.0 h")])
def test_durations_have_one_unit(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(5.9, "0:05"), (65, "1:05"), (3600 + 62, "1:01:02")])
def test_clocks_move_every_second(seconds: float, shown: str) -> None:
    assert format_clock(seconds) == shown


def test_a_process_writes_what_it_does_for_others(tmp_path: Path) -> None:
    file = tmp_path / "later" / DOING
    assert read_written(file) == ""
    with written(file):
        file.parent.mkdir()  # as a run's folder, it comes after the process has begun
        with phase("a", "evaluating", 3):
            deadline = time.monotonic() + 60
            while read_written(file) != "evaluating 0/3":
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert list(file.parent.iterdir()) == []


def test_what_was_written_by_a_process_that_ended_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / DOING
    file.write_text("training\n")
    assert read_written(file) == "training"
    os.utime(file, (time.time() - 120,) * 2)
    assert read_written(file) == ""
