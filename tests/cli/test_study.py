"""What ``fedlora study`` prints, and how it ends when the file is wrong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedlora.cli.phases import PhaseDisplay
from fedlora.cli.study import StudyDisplay
from fedlora.study.config import load_study
from fedlora.study.plan import PlannedRun, make_plan
from tests.command import fedlora
from tests.study.studies import planned

SUMMARY: dict[str, Any] = {
    "final": {"accuracy": 0.7512},
    "epsilon": {"max": 2.9954},
    "communication": {"initial_bytes": 1000, "downlink_bytes": 2000, "uplink_bytes": 3000},
    "seconds": {"total": 12.34},
}


@pytest.fixture
def run() -> PlannedRun:
    return make_plan(load_study(planned(axes={"method.rank": [3]}))).runs[0]


def test_every_run_has_a_line(run: PlannedRun) -> None:
    out = io.StringIO()
    with PhaseDisplay(Console(file=out, width=100)) as phases:
        display = StudyDisplay(phases)
        display.progress.on_plan(5, 2)
        display.progress.on_start(run)
        display.progress.on_end(run, SUMMARY, None)
    assert out.getvalue().splitlines() == [
        "2 of 5 runs are done already",
        "runs/rank-3  accuracy 75.1%  epsilon 2.995  sent 6.0 kB  12.3 s",
    ]
    display.progress.on_end(run, None, "out of luck")
    assert out.getvalue().splitlines()[-1] == "runs/rank-3  failed: out of luck"


def test_the_choice_of_a_rate_and_what_it_cost_are_told() -> None:
    out = io.StringIO()
    display = StudyDisplay(PhaseDisplay(Console(file=out, width=100)))
    group = {"values": {"method.name": "fedit"}, "chosen": 0.1, "at_edge": True, "covered_by_privacy": False}
    display.progress.on_choice(group)
    cost = {"runs": 4, "seconds": 61.0, "bytes": 1234567}
    tuning = {"seeds": [7], "cost": cost, "groups": [group]}
    display.summary({"tuning": tuning, "points": [{"status": "done"}], "seconds": 99.0}, Path("runs/x"))
    assert out.getvalue().splitlines() == [
        "chosen for method.name fedit: 0.1 (at the edge of its candidates)",
        "tuning      4 runs, 61 s, 1.2 MB, on validation data at seed 7",
        "            epsilon does not cover the tuning runs on private data",
        "runs        1",
        "seconds     99.0",
        "folder      runs/x",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "STUDY = "),
        ("[study", "STUDY = "),
        ("[study]\nname = 3\n[base]\n", "study.name = 3: "),
        ("[base.model]\nname = 'x'\n", "data = None: is required"),
    ],
)
def test_a_wrong_file_is_one_line_and_exit_2(text: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    if text is not None:
        path.write_text(text)
    done = fedlora("study", path, "--output", tmp_path / "out")
    assert done.code == 2
    assert done.err.startswith(f"fedlora: {told}")
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
