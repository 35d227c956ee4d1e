"""Execute a plan: find the runs that are done, execute the others, and choose tuned values."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray

from fedlora.errors import InputError, RunError
from fedlora.results.folder import write_atomically
from fedlora.simulation.ray_cluster import start_ray
from fedlora.status import read_written
from fedlora.study.config import can_widen
from fedlora.study.forecast import Forecast, forecast_all
from fedlora.study.plan import Plan, PlannedRun, TuningGroup
from fedlora.study.run_processes import address_of, begun, count_runs, doing_file, start_process
from fedlora.study.state import StudyFolder, all_entries, check_output
from fedlora.study.tuning import beyond, choose, cost, validation_score
from fedlora.tasks import get_task
from fedlora.timeline import Phase, phase

_LOOK_SECONDS = 0.5


@dataclass
class StudyProgress:
    """Hooks for a display; each does nothing by default.

    Attributes
    ----------
    on_plan : callable (runs in all, runs done before)
    on_start : callable (run)
    on_end : callable (run, summary or None, error or None)
    on_widen : callable (what study.json says of a group, the further candidate, its runs)
    on_choice : callable (what study.json says of a group)
    """

    on_plan: Callable[[int, int], None] = lambda total, done: None
    on_start: Callable[[PlannedRun], None] = lambda run: None
    on_end: Callable[[PlannedRun, dict[str, Any] | None, str | None], None] = lambda run, summary, error: None
    on_widen: Callable[[dict[str, Any], Any, int], None] = lambda group, value, runs: None
    on_choice: Callable[[dict[str, Any]], None] = lambda group: None


@dataclass
class _Job:
    """A run to execute, for a point of the plan or for a candidate of a group."""

    run: PlannedRun
    entry: dict[str, Any]
    group: int | None = None
    announced: ExitStack = field(default_factory=ExitStack)

    def begin(self, study: Path) -> None:
        """Announce that it runs."""
        folder = study / self.run.folder
        rounds, doing = self.run.config.run.rounds, partial(read_written, doing_file(study, self.run.folder))
        self.shown = self.announced.enter_context(phase("run", self.run.folder, rounds, _rounds(folder), doing))
        self.entry["status"] = "running"


@dataclass
class _Execution:
    plan: Plan
    folder: StudyFolder
    forecasts: dict[str, Forecast | InputError]
    progress: StudyProgress
    queue: deque[_Job] = field(default_factory=deque)
    state: dict[str, Any] = field(default_factory=dict)
    shown: Phase = field(default_factory=lambda: Phase("runs"))
    started: float = field(default_factory=time.perf_counter)

    def prepare(self) -> None:
        """Find the runs that are done, and queue the others."""
        earlier = float(self.folder.read().get("seconds", 0.0))
        self.state = {
            "name": self.plan.study.study.name,
            "keys": self.plan.keys,
            "seconds": earlier,
            "points": [_entry(run, self.forecasts[run.folder]) for run in self.plan.runs],
            "tuning": _tuning_entry(self.plan, self.forecasts),
            "report": self.plan.study.report.model_dump(),
        }
        self._earlier = earlier
        candidates = [run for group in self.plan.groups for _, run in group.candidates]
        self.folder.begin(self.plan.study, [*self.plan.runs, *candidates])
        self.total = len(self.plan.runs) + len(candidates)
        if not self.plan.groups:
            for place, run in enumerate(self.plan.runs):
                self._add(_Job(run, self.state["points"][place]))
        for number, group in enumerate(self.plan.groups):
            entries = self.state["tuning"]["groups"][number]["candidates"]
            for (_, run), entry in zip(group.candidates, entries, strict=True):
                self._add(_Job(run, entry, number))
        for number in range(len(self.plan.groups)):
            self._choose(number)
        self.progress.on_plan(self.total, sum(entry["status"] == "done" for entry in all_entries(self.state)))
        self.save()

    def finish(self, job: _Job, result: dict[str, Any]) -> None:
        """Record a run's outcome, and choose the tuned value once its group is complete."""
        error = result.get("error")
        job.announced.close()
        job.entry["status"], job.entry["error"] = ("failed", error) if error else ("done", None)
        if error:
            errors = self.folder.path / "errors"
            errors.mkdir(exist_ok=True)
            write_atomically(errors / f"{job.run.folder.replace('/', '-')}.txt", result.get("traceback") or error)
        self.progress.on_end(job.run, result.get("summary"), error)
        if job.group is not None:
            self._choose(job.group)
        self.shown.done = self.ended()
        self.save()

    def ended(self) -> int:
        """Return how many runs are done or failed."""
        return sum(entry["status"] in ("done", "failed") for entry in all_entries(self.state))

    def save(self) -> None:
        """Write study.json."""
        self.state["seconds"] = self._earlier + time.perf_counter() - self.started
        self.folder.write(self.state)

    def failed(self) -> list[dict[str, Any]]:
        """Return the study.json entry of every failed run."""
        return [entry for entry in all_entries(self.state) if entry["status"] == "failed"]

    def _add(self, job: _Job) -> None:
        if job.entry["status"] == "failed":  # by its forecast
            self.progress.on_end(job.run, None, job.entry["error"])
        elif self.folder.find(job.run) == "done":
            job.entry["status"] = "done"
        else:
            self.queue.append(job)

    def _choose(self, number: int) -> None:
        """Choose the value of a group whose candidates have all run, and queue its runs."""
        assert self.plan.study.tuning is not None
        group, entry = self.plan.groups[number], self.state["tuning"]["groups"][number]
        if entry["complete"] or any(c["status"] not in ("done", "failed") for c in entry["candidates"]):
            return
        scores = []
        for candidate in entry["candidates"]:
            done = candidate["status"] == "done"
            candidate["validation"] = validation_score(self.folder.path / candidate["run"]) if done else None
            scores.append(candidate["validation"])
        folders = [self.folder.path / c["run"] for c in entry["candidates"] if c["status"] == "done"]
        entry["cost"] = cost([_summary(folder) for folder in folders])
        seeds = len(self.plan.study.tuning.seeds)
        values = [value for value, _ in group.candidates[::seeds]]
        numbers = can_widen(values)
        by_value = [scores[place : place + seeds] for place in range(0, len(scores), seeds)]
        best = choose(by_value, get_task(group.candidates[0][1].config.model.task))
        if best is not None and numbers and self._widen(number, values, values[best]):
            return
        entry["complete"] = True
        if best is not None:
            entry["chosen"] = values[best]
            # The optimum may lie outside the range of the candidates.
            if len(values) > 2 and numbers:
                entry["at_edge"] = entry["chosen"] in (min(values), max(values))
        self.state["tuning"]["cost"] = _sum([g["cost"] for g in self.state["tuning"]["groups"]])
        self.progress.on_choice(entry)
        for place in group.points:
            point = self.state["points"][place]
            if best is None and point["status"] != "failed":
                point["status"] = "failed"
                point["error"] = f"no {self.plan.study.tuning.over} was chosen: every tuning run of its group failed"
                self.progress.on_end(self.plan.runs[place], None, point["error"])
            elif point["status"] != "failed":
                run = self.plan.chosen(place, entry["chosen"])
                point["values"] = run.values
                self._add(_Job(run, point))
            else:
                self._add(_Job(self.plan.runs[place], point))

    def _widen(self, number: int, values: list[Any], best: Any) -> bool:
        """Queue a candidate beyond the best one if that is the lowest or highest; return whether there is one."""
        assert self.plan.study.tuning is not None
        group, entry = self.plan.groups[number], self.state["tuning"]["groups"][number]
        value = beyond(values, best)
        if value is None or entry["widened"] >= self.plan.study.tuning.widen:
            return False
        try:
            added = self.plan.tuning_runs(group, value)
        except InputError:  # the key allows no such value, so that the best candidate is at the edge of what there is
            return False
        forecasts = forecast_all([run for _, run in added])
        entry["widened"] += 1
        group.candidates.extend(added)
        entry["candidates"] += _candidate_entries(added, forecasts)
        self.total += len(added)
        self.shown.total = self.total
        self.progress.on_widen(entry, value, len(added))
        for (_, run), candidate in zip(added, entry["candidates"][-len(added) :], strict=True):
            self._add(_Job(run, candidate, number))
        self._choose(number)  # at once, if these were done before
        return True


def run_study(plan: Plan, path: str | Path, progress: StudyProgress | None = None) -> dict[str, Any]:
    """Execute or resume a plan; runs that are done and unchanged stay.

    Parameters
    ----------
    plan : Plan
    path : str or Path
        The study's folder.
    progress : StudyProgress, optional

    Returns
    -------
    dict
        The content of study.json.

    Raises
    ------
    InputError
        If every run is impossible, or not even one fits.
    RunError
        If some runs failed; all others are done.
    """
    progress = progress or StudyProgress()
    check_output(Path(path))
    candidates = [run for group in plan.groups for _, run in group.candidates]
    forecasts = forecast_all([*plan.runs, *candidates])
    folder = StudyFolder(path)
    try:
        execution = _Execution(plan, folder, forecasts, progress)
        execution.prepare()
        if execution.queue:
            with phase("runs", "runs", execution.total, execution.ended()) as execution.shown:
                _execute(execution)
        execution.save()
    finally:
        folder.close()
    failed = execution.failed()
    if failed:
        raise RunError(
            f"{len(failed)} of {execution.total} runs failed; the first, {failed[0]['name']}: {failed[0]['error']} "
            "(the same command runs them again)"
        )
    return execution.state


def _execute(execution: _Execution) -> None:
    study, config = execution.plan.study, execution.plan.runs[0].config
    started = start_ray(address_of(study))
    runners: set[Any] = set()
    starting: dict[Any, Any] = {}  # reference -> runner
    running: dict[Any, tuple[_Job, Any]] = {}
    idle: list[Any] = []
    announced = ExitStack()

    def start() -> None:
        runner = start_process(study, config)
        runners.add(runner)
        starting[runner.ready.remote()] = runner

    try:
        left = sum(entry["status"] == "planned" for entry in all_entries(execution.state))
        count = min(left, count_runs(study, config))
        shown = announced.enter_context(phase("processes", "starting processes", count))
        for _ in range(count):
            start()
        while execution.queue or running:
            while execution.queue and idle:
                job, runner = execution.queue.popleft(), idle.pop()
                folder = str(execution.folder.path.resolve())
                job.begin(execution.folder.path)
                running[runner.run.remote(job.run.config.to_toml(), folder, job.run.folder)] = (job, runner)
                execution.progress.on_start(job.run)
                execution.save()
            ready, _ = ray.wait([*running, *starting], num_returns=1, timeout=_LOOK_SECONDS)
            for reference in ready:
                if reference in starting:
                    # Only a process that has started gets a run: one that waits for room in the cluster would block it.
                    idle.append(begun(reference, starting.pop(reference)))
                    shown.advance()
                    continue
                job, runner = running.pop(reference)
                try:
                    result = ray.get(reference)
                    idle.append(runner)
                except ray.exceptions.RayError as error:
                    result = {"error": f"its process ended: {type(error).__name__}", "traceback": str(error)}
                    runners.remove(runner)
                    start()
                execution.finish(job, result)
            for job, _ in running.values():
                job.shown.done = _rounds(execution.folder.path / job.run.folder)
            if not starting:
                announced.close()
    finally:
        announced.close()
        for job, _ in running.values():
            job.announced.close()
            job.entry["status"] = "planned"
        execution.save()
        for runner in runners:
            ray.kill(runner)
        if started:
            ray.shutdown()


def _rounds(folder: Path) -> int:
    try:
        return (folder / "rounds.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def _entry(run: PlannedRun, expected: Forecast | InputError) -> dict[str, Any]:
    impossible = isinstance(expected, InputError)
    return {
        "name": run.name,
        "run": run.folder,
        "values": run.values,
        "status": "failed" if impossible else "planned",
        "error": str(expected) if impossible else None,
        "forecast": None if isinstance(expected, InputError) else expected.to_dict(),
    }


def _tuning_entry(plan: Plan, forecasts: dict[str, Forecast | InputError]) -> dict[str, Any] | None:
    tuning = plan.study.tuning
    if tuning is None:
        return None
    return {
        "over": tuning.over,
        "seeds": tuning.seeds,
        "validation": plan.runs[0].config.data.validation,
        "cost": cost([]),
        "groups": [_group_entry(group, plan, forecasts) for group in plan.groups],
    }


def _group_entry(group: TuningGroup, plan: Plan, forecasts: dict[str, Forecast | InputError]) -> dict[str, Any]:
    return {
        "values": group.values,
        "chosen": None,
        "at_edge": False,
        "complete": False,
        # Private validation data costs privacy that no run's epsilon counts.
        "covered_by_privacy": False if group.private else None,
        "cost": cost([]),
        "points": [plan.runs[place].name for place in group.points],
        "widened": 0,
        "candidates": _candidate_entries(group.candidates, forecasts),
    }


def _candidate_entries(
    candidates: list[tuple[Any, PlannedRun]], forecasts: dict[str, Forecast | InputError]
) -> list[dict[str, Any]]:
    return [
        {"value": value, "seed": run.config.run.seed, **_entry(run, forecasts[run.folder])} for value, run in candidates
    ]


def _sum(costs: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(entry[name] for entry in costs) for name in costs[0]}
