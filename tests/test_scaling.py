"""The benchmark of scaling at its smallest, and what it makes of raw figures."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedlora.capacity import Capacity
from fedlora.experiments.benchmarks import scaling
from fedlora.simulation import LocalGrid
from tests.bare_runs import bare_runs
from tests.messages import train_message
from tests.simulation import apps


def run(workers: int, clients: int, wall: float) -> dict[str, Any]:
    seconds = {"wall": wall, "train": 0.8 * wall, "driver": 0.3 * wall, "driver_cpu": 0.2 * wall, "aggregate": 0.1}
    return {"workers": workers, "clients": clients, "rounds": [seconds] * 3}


def test_efficiency_is_the_share_of_the_ideal() -> None:
    rows = [run(1, 100, 2.0), run(2, 100, 1.25), run(2, 200, 2.0), {"workers": 4, "clients": 100, "error": "no memory"}]
    assert [scaling.efficiency(rows, row) for row in rows[:3]] == pytest.approx([1.0, 0.8, 1.0])
    assert scaling.efficiency(rows[1:], rows[1]) is None
    lines = list(scaling.table({"cases": {"tiny": rows}}))[2:]
    assert lines[1] == "| tiny | 2 | 100 | strong | 1.25 | 0.80 | 80% | 30% | 2.50 |"
    assert "weak" in lines[2]
    assert "no memory" in lines[3]


def test_strong_and_weak_scaling_share_the_run_on_one_worker() -> None:
    assert list(scaling.sizes({"clients": 10}, [1, 2, 4])) == [(1, 10), (2, 10), (2, 20), (4, 10), (4, 40)]


@pytest.mark.usefixtures("ray_here")
def test_a_case_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scaling, "_child", scaling.measure)
    output, config = tmp_path / "scaling.json", tmp_path / "scaling.toml"
    settings = tomllib.loads(Path(scaling.__file__).with_suffix(".toml").read_text())
    (case,) = [case | {"clients": 3, "cohort": 2} for case in settings["cases"] if case["name"] == "tiny"]
    config.write_text(tomli_w.dumps(settings | {"rounds": 2, "cases": [case]}))
    given = ["--config", str(config), "--workers", "2", "--cases", "tiny", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["scaling", *given])
    with bare_runs():
        scaling.main()
    rows = json.loads(output.read_text())["cases"]["tiny"]
    assert [(row["workers"], row["clients"], row["failed"], len(row["rounds"])) for row in rows] == [
        (2, 3, 0, 1),
        (2, 6, 0, 1),
    ]
    for row in rows:
        (seconds,) = row["rounds"]
        assert 0 < seconds["driver"] < seconds["wall"]
        assert 0 < seconds["train"] < seconds["wall"]
    monkeypatch.setattr("sys.argv", ["scaling", "--read", str(output)])
    capsys.readouterr()
    scaling.main()
    assert "| tiny | 2 | 6 |" in capsys.readouterr().out


@pytest.mark.parametrize(("clients", "workers", "held", "passes"), [(1000, 2, 384, [250] * 4), (7, 2, 4, [4, 3])])
def test_workers_get_passes_of_equal_size(clients: int, workers: int, held: int, passes: list[int]) -> None:
    """Two passes of 384 clients and one of 232 would leave one of two workers without work for a third of the time."""
    grid = LocalGrid(apps.plain, clients, cohort_size="auto")
    grid.num_workers = workers
    batches = grid.batches([train_message(2 + i) for i in range(clients)], lambda most: Capacity(min(held, most)))
    assert [len(batch) for batch in batches] == passes
