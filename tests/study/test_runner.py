"""Whole studies on MiniLM's first layer: forecasts come true, a killed study goes on, a failing run stays alone."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray
import tomli_w

from fedlora.errors import InputError
from fedlora.study.config import load_study
from fedlora.study.plan import PlannedRun, make_plan
from fedlora.study.run_processes import count_runs
from fedlora.study.runner import StudyProgress, run_study
from fedlora.study.state import StudyFolder, all_entries, read_state
from fedlora.timeline import active
from tests.command import fedlora
from tests.study.mortal import Mortal
from tests.study.studies import TINY, tiny

ROOT = Path(__file__).parents[2]
OTHER = """
import sys
from filelock import FileLock, Timeout
lock = FileLock(sys.argv[1])
try:
    lock.acquire(timeout=0)
except Timeout:
    print("Timeout", flush=True)
input()
lock.acquire(timeout=0)
print("locked", flush=True)
input()
"""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cached", "ray_here")]


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "tiny.toml"
    path.write_text(tomli_w.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def commanded(study_file: Path) -> tuple[Path, str]:
    """The study, run by the command, and what that printed."""
    folder = study_file.parent / "done"
    done = fedlora("study", study_file, "--output", folder)
    assert (done.code, done.err) == (0, "")
    return folder, done.out


def table(folder: Path) -> dict[str, Any]:
    """Return what the runs gave, but for their seconds."""
    found = {}
    for entry in all_entries(read_state(folder)):
        summary = json.loads((folder / entry["run"] / "summary.json").read_text())
        kept = ("final", "best", "epsilon", "communication", "trainable_parameters")
        found[entry["run"]] = {key: summary[key] for key in kept} | {"values": entry["values"]}
    return found


def changed_at(folder: Path) -> dict[str, int]:
    return {str(path.parent): path.stat().st_mtime_ns for path in folder.rglob("summary.json")}


def test_every_planned_run_is_done(commanded: tuple[Path, str]) -> None:
    folder, out = commanded
    state = read_state(folder)
    assert len(state["points"]) == 4
    assert len(all_entries(state)) == 8
    assert {entry["status"] for entry in all_entries(state)} == {"done"}
    for entry in state["points"]:
        assert f"{entry['run']}  accuracy" in out
    assert "epsilon does not cover the tuning runs" in out


def test_the_forecast_comes_true(commanded: tuple[Path, str]) -> None:
    folder, _ = commanded
    for entry in all_entries(read_state(folder)):
        expected, run = entry["forecast"], folder / entry["run"]
        with (run / "communication.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        sent: Counter[str] = Counter()
        for row in rows:
            sent[row["direction"]] += int(row["payload_bytes"])
        assert sent["initial"] == expected["initial_bytes"] > 0
        assert sent["down"] == expected["downlink_bytes"] > 0
        assert sent["up"] == expected["uplink_bytes"] > 0
        with (run / "privacy.csv").open() as stream:
            steps = list(csv.DictReader(stream))
        for row in steps:
            assert float(row["noise_multiplier"]) == expected["noise_multipliers"][int(row["client"])]
        assert sum(int(row["steps"]) for row in steps) == expected["steps"]
        summary = json.loads((run / "summary.json").read_text())
        assert summary["trainable_parameters"] == expected["trainable_parameters"]


def test_the_dry_run_prints_the_forecast_and_writes_nothing(commanded: tuple[Path, str], study_file: Path) -> None:
    folder, _ = commanded
    new = study_file.parent / "never"
    done = fedlora("study", study_file, "--output", new, "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert not new.exists()
    lines = {line.split()[0]: line.split() for line in done.out.splitlines() if line.strip()}
    for entry in all_entries(read_state(folder)):
        expected = entry["forecast"]
        shown = [cell.replace(",", "") for cell in lines[entry["run"]]]
        names = ("trainable_parameters", "initial_bytes", "downlink_bytes", "uplink_bytes", "steps")
        assert shown[1:6] == [str(expected[name]) for name in names]
        assert shown[6] == f"{min(expected['noise_multipliers']):.4g}"
    assert "4 runs and 4 tuning runs" in done.out
    assert "on this machine, 2 in parallel" in done.out


def test_the_choice_is_the_best_on_validation_and_its_cost_is_told(commanded: tuple[Path, str]) -> None:
    folder, _ = commanded
    tuning = read_state(folder)["tuning"]
    assert tuning["cost"]["runs"] == 4
    sent = 0
    for group in tuning["groups"]:
        scores = {}
        for candidate in group["candidates"]:
            run = folder / candidate["run"]
            last = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])["metrics"]["validation"]
            scores[candidate["value"]] = (last["accuracy"], -last["loss"])
            traffic = json.loads((run / "summary.json").read_text())["communication"]
            sent += traffic["initial_bytes"] + traffic["downlink_bytes"] + traffic["uplink_bytes"]
        assert scores[group["chosen"]] == max(scores.values())
        assert group["covered_by_privacy"] is False
        for name in group["points"]:
            config = (folder / "runs" / name / "config.toml").read_text()
            assert f"learning_rate = {group['chosen']}\n" in config
    assert tuning["cost"]["bytes"] == sent


def test_a_finished_study_is_left_as_it_is(commanded: tuple[Path, str], study_file: Path) -> None:
    folder, _ = commanded
    before = changed_at(folder)
    done = fedlora("study", study_file, "--output", folder)
    assert (done.code, done.err) == (0, "")
    assert "8 of 8 runs are done already" in done.out
    assert changed_at(folder) == before


def test_a_killed_study_goes_on_to_the_same_table(commanded: tuple[Path, str], study_file: Path) -> None:
    folder, file = study_file.parent / "killed", study_file.parent / "killed.toml"
    # One method's half of the study, on the Ray of this process, which is there already.
    base = TINY["base"] | {"simulation": {"address": ray.get_runtime_context().gcs_address}}
    file.write_text(tomli_w.dumps(TINY | {"base": base, "axes": TINY["axes"] | {"method.name": ["fed-sb"]}}))
    command = [sys.executable, "-m", "tests.killed_study", str(file), str(folder)]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    before = changed_at(folder)
    assert 2 <= len(before) < 4
    assert "running" in {entry["status"] for entry in all_entries(read_state(folder))}
    # One process is enough for what is left.
    done = fedlora("study", file, "--output", folder, "--set", "budget.runs=1")
    assert (done.code, done.err) == (0, "")
    assert {path: at for path, at in changed_at(folder).items() if path in before} == before
    assert table(folder) == {name: run for name, run in table(commanded[0]).items() if "fed-sb" in name}
    assert not (folder / "replaced").exists()


def test_what_is_missing_or_changed_runs_and_nothing_is_lost(tmp_path: Path) -> None:
    folder, executed = tmp_path / "study", []
    shown: list[tuple[str, int]] = []

    def start(run: PlannedRun) -> None:
        executed.append(run.name)
        shown.extend((phase.shown, phase.total) for phase in active())

    def run(*points: dict[str, Any]) -> dict[str, int]:
        study = tiny(points=list(points), budget={"runs": 1, "memory_per_run": 1.0})
        del study["axes"], study["tuning"]
        executed.clear()
        run_study(make_plan(load_study(study)), folder, StudyProgress(on_start=start))
        return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/summary.json")}

    a, b, c = {"label": "a"}, {"label": "b", "run.seed": 1}, {"label": "c", "run.seed": 2}
    first = run(a, b)
    assert executed == ["a", "b"]
    assert {("runs", 2), ("runs/a", 2), ("runs/b", 2)} <= set(shown)
    assert active() == []
    second = run({**a, "client.local_steps": 1}, c)
    assert executed == ["a", "c"]
    assert sorted(second) == ["a", "c"]
    # What was planned before is taken back as it was.
    third = run(a, b, c)
    assert executed == []
    assert third == {**first, "c": second["c"]}
    assert [path.name for path in (folder / "replaced").iterdir()] == ["a-2"]


def test_a_failing_run_does_not_end_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.study.run_processes.Runner", Mortal)
    study = tiny(
        points=[
            {"label": "dies"},
            {"label": "too-high-a-rank", "method": {"rank": 400}},
            {
                "label": "explodes",
                "client": {"optimizer": "sgd", "learning_rate": 1000.0, "weight_decay": 100.0},
                "privacy": {"mode": "none"},
            },
            {"label": "good", "method": {"rank": 2}},
        ],
        budget={"runs": 1, "memory_per_run": 1.0},
    )
    del study["axes"], study["tuning"]
    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps(study))
    done = fedlora("study", path, "--output", tmp_path / "out")
    assert done.code == 1
    assert done.err.startswith("fedlora: 3 of 4 runs failed; the first, dies: its process ended: ActorDiedError")
    assert len(done.err.strip().splitlines()) == 1
    points = {point["name"]: point for point in read_state(tmp_path / "out")["points"]}
    assert {name: point["status"] for name, point in points.items()} == {
        "dies": "failed",
        "too-high-a-rank": "failed",
        "explodes": "failed",
        "good": "done",
    }
    assert "method.rank = 400" in points["too-high-a-rank"]["error"]
    assert "not finite" in points["explodes"]["error"]
    assert "not finite" in (tmp_path / "out/errors/runs-explodes.txt").read_text()


def test_a_study_that_cannot_be_at_all_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"method\.rank = 400"):
        run_study(make_plan(load_study(TINY, {"method.rank": "400"})), tmp_path / "out")
    with pytest.raises(InputError, match=r"budget\.memory_per_run = 1000000.0: no machine has room"):
        run_study(make_plan(load_study(TINY, {"budget.memory_per_run": "1e6"})), tmp_path / "out")
    with pytest.raises(InputError, match=r"simulation\.gpus_per_worker = 0.5: Ray sees no GPU"):
        run_study(make_plan(load_study(TINY, {"simulation.gpus_per_worker": "0.5"})), tmp_path / "out")


def test_a_folder_of_another_kind_is_refused_and_one_in_use_too(tmp_path: Path, study_file: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    done = fedlora("study", study_file, "--output", tmp_path)
    assert (done.code, done.err.split(" = ")[0]) == (2, "fedlora: --output")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    held = StudyFolder(tmp_path / "held")
    # The lock is the process's: another one, which needs nothing else of ours, asks, and then has it.
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, tmp_path / "held" / ".lock"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "Timeout\n"
        held.close()
        other.stdin.write("again\n")
        other.stdin.flush()
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match="another process is at this study"):
            StudyFolder(tmp_path / "held")
        other.communicate("end\n")
    StudyFolder(tmp_path / "held").close()


@pytest.mark.parametrize(
    ("nodes", "overrides", "expected"),
    [
        ([{"CPU": 16, "GPU": 1, "memory": 100 * 2**30}], {"simulation.gpus_per_worker": 0.15}, 6),
        # A share is of one GPU: 8 / 0.15 = 53 would not fit.
        ([{"CPU": 128, "GPU": 8, "memory": 500 * 2**30}], {"simulation.gpus_per_worker": 0.15}, 48),
        ([{"CPU": 16, "GPU": 4, "memory": 100 * 2**30}], {"simulation.gpus_per_worker": 2.0}, 2),
        ([{"CPU": 16, "memory": 7 * 2**30}], {}, 2),
        ([{"CPU": 16, "memory": 100 * 2**30}], {"simulation.cpus_per_worker": 5}, 3),
        ([{"CPU": 2, "memory": 100 * 2**30}, {"CPU": 3, "memory": 6 * 2**30}], {}, 4),
        ([{"CPU": 16, "memory": 100 * 2**30}], {"budget.runs": 3}, 3),
    ],
)
def test_as_many_runs_as_fit(
    nodes: list[dict[str, float]], overrides: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": resources} for resources in nodes])
    study = load_study(tiny(budget={"memory_per_run": 3.0}), overrides)
    assert count_runs(study, make_plan(study).runs[0].config) == expected
