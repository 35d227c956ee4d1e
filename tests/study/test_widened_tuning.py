"""A best candidate at the edge: the runner tries further ones, and finds them again when the study is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import InputError
from fedlora.study import runner
from fedlora.study.config import load_study
from fedlora.study.forecast import Forecast
from fedlora.study.plan import PlannedRun, make_plan
from fedlora.study.state import StudyFolder
from tests.study.studies import planned

COST = Forecast(1, 1, 0, 1, 1, 1, 1, [], [])
TRAFFIC = {"initial_bytes": 0, "downlink_bytes": 1, "uplink_bytes": 1}


def study(**tuning: Any) -> dict[str, Any]:
    values = {"values": [0.01, 0.03, 0.1], "seeds": [0, 1], "widen": 2}
    return planned(axes={"method.name": ["ffa-lora", "fed-sb"], "run.seed": [0, 1]}, tuning={**values, **tuning})


def execute(folder: Path, score: Callable[[PlannedRun], float], **tuning: Any) -> tuple[dict[str, Any], list[str]]:
    """Execute a study whose runs end at once with a validation accuracy; return study.json and the runs executed."""
    plan = make_plan(load_study(study(**tuning)))
    runs = [*plan.runs, *(run for group in plan.groups for _, run in group.candidates)]
    kept = StudyFolder(folder)
    work = runner._Execution(plan, kept, {run.folder: COST for run in runs}, runner.StudyProgress())
    work.prepare()
    executed = []
    while work.queue:
        job = work.queue.popleft()
        executed.append(job.run.folder)
        place = folder / job.run.folder
        place.mkdir(parents=True)
        (place / "config.toml").write_text(job.run.config.to_toml())
        summary = {"seconds": {"total": 1.0}, "communication": TRAFFIC}
        (place / "summary.json").write_text(json.dumps(summary))
        validation = {"accuracy": score(job.run), "loss": 0.5}
        (place / "rounds.jsonl").write_text(json.dumps({"metrics": {"validation": validation}}) + "\n")
        work.finish(job, {"summary": summary})
    work.save()
    kept.close()
    return kept.read(), executed


@pytest.fixture(autouse=True)
def free_forecasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "forecast_all", lambda runs: {run.folder: COST for run in runs})


def nearest(to: float) -> Callable[[PlannedRun], float]:
    return lambda run: 1 - abs(run.config.client.learning_rate - to)


@pytest.mark.parametrize(
    ("optimum", "tried", "chosen", "at_edge"),
    [
        (0.03, [], 0.03, False),
        (0.3, [0.3, 1.0], 0.3, False),
        (9.0, [0.3, 1.0], 1.0, True),
        (0.0, [0.003, 0.001], 0.001, True),
    ],
)
def test_candidates_are_added_until_the_best_is_inside(
    tmp_path: Path, optimum: float, tried: list[float], chosen: float, at_edge: bool
) -> None:
    state, executed = execute(tmp_path / "study", nearest(optimum))
    for group in state["tuning"]["groups"]:
        assert [c["value"] for c in group["candidates"][6::2]] == tried
        assert (group["chosen"], group["at_edge"], group["complete"]) == (chosen, at_edge, True)
        assert group["cost"]["runs"] == 6 + 2 * len(tried)
    assert {point["values"]["client.learning_rate"] for point in state["points"]} == {chosen}
    assert {point["status"] for point in state["points"]} == {"done"}
    assert len(executed) == len(set(executed)) == 4 + 2 * (6 + 2 * len(tried))


def test_without_widening_the_edge_is_only_told(tmp_path: Path) -> None:
    state, executed = execute(tmp_path / "study", nearest(9.0), widen=0)
    assert [(group["chosen"], group["at_edge"]) for group in state["tuning"]["groups"]] == [(0.1, True)] * 2
    assert len(executed) == 4 + 2 * 6


def test_a_finished_study_finds_its_further_candidates_again(tmp_path: Path) -> None:
    before, _ = execute(tmp_path / "study", nearest(0.3))
    after, executed = execute(tmp_path / "study", nearest(0.3))
    assert executed == []
    assert after["tuning"] == before["tuning"]
    assert after["points"] == before["points"]


def test_what_cannot_be_widened_is_refused() -> None:
    for values in (["adamw", "sgd"], [0.0, 0.1], [0.1]):
        with pytest.raises(InputError, match=r"tuning\.values = .*list at least two numbers above 0"):
            load_study(study(values=values))
