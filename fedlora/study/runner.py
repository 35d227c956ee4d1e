"""Runs a plan: processes on one Ray cluster, each of which executes one run after the other.

A process keeps its libraries, its base model and its data loaded, and its run's clients train in it, so that a run
costs little more than its training.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch

from fedlora.config import Config, load_config
from fedlora.errors import InputError, RunError
from fedlora.results.folder import RunFolder, write_atomically
from fedlora.simulation.ray_grid import start_ray
from fedlora.simulator import simulate
from fedlora.study.config import Study
from fedlora.study.forecast import Forecast, forecast_all
from fedlora.study.plan import Group, Plan, Run
from fedlora.study.state import StudyFolder, all_entries, set_aside
from fedlora.study.tuning import choose, cost, validation_score

_LOOK_SECONDS = 0.5
_LOCK_SECONDS = 60.0
"""How long a killed study's processes may take to end: until then they hold their run's checkpoint."""


@dataclass
class StudyProgress:
    """What a display may show; every hook does nothing by default.

    Attributes
    ----------
    on_plan : callable (runs in all, runs done before)
    on_start : callable (run)
    on_round : callable (run, rounds done)
    on_end : callable (run, summary or None, error or None)
    on_choice : callable (what study.json says of a group)
    """

    on_plan: Callable[[int, int], None] = lambda total, done: None
    on_start: Callable[[Run], None] = lambda run: None
    on_round: Callable[[Run, int], None] = lambda run, rounds: None
    on_end: Callable[[Run, dict[str, Any] | None, str | None], None] = lambda run, summary, error: None
    on_choice: Callable[[dict[str, Any]], None] = lambda group: None


class Runner:
    """The process that executes runs; a Ray actor.

    Parameters
    ----------
    cpus : int
        Threads.
    gpus : float
        Share of a GPU, and of its memory; 0 for none.
    command : list of str
        The user's, for the runs' summaries.
    """

    def __init__(self, cpus: int, gpus: float, command: list[str]) -> None:
        sys.argv = command
        torch.set_num_threads(cpus)
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        elif gpus < 1:
            torch.cuda.set_per_process_memory_fraction(gpus)

    def ready(self) -> bool:
        """Answer, once everything is imported."""
        return True

    def run(self, config: str, study: str, folder: str) -> dict[str, Any]:
        """Execute a run, or go on with it; return its ``summary``, or its ``error`` in a line and ``traceback``."""
        try:
            place = Path(study) / folder
            resume = place.exists() and _can_go_on(load_config(config), Path(study), place)
            return {"summary": simulate(config, output=place, resume=resume).summary}
        except (InputError, RunError) as error:
            return {"error": str(error).strip(), "traceback": traceback.format_exc()}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}".strip(), "traceback": traceback.format_exc()}
        finally:
            gc.collect()  # models have reference cycles, which would hold their memory
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def _can_go_on(config: Config, study: Path, place: Path) -> bool:
    """Say whether an unfinished run can be resumed; one that cannot is set aside."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            RunFolder.resume(place, config).close()
            return True
        except InputError as error:
            if "another process" in error.remedy and time.monotonic() < deadline:
                time.sleep(1)
                continue
            set_aside(study, place)
            return False


@dataclass
class _Job:
    """A run to execute, for a point of the plan or for a candidate of a group."""

    run: Run
    entry: dict[str, Any]
    group: int | None = None
    rounds: int = 0


@dataclass
class _Execution:
    plan: Plan
    folder: StudyFolder
    forecasts: dict[str, Forecast | InputError]
    progress: StudyProgress
    queue: deque[_Job] = field(default_factory=deque)
    state: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def prepare(self) -> None:
        """Find what is done, and queue what is not."""
        earlier = float(self.folder.read().get("seconds", 0.0))
        self.state = {
            "name": self.plan.study.study.name,
            "keys": self.plan.keys,
            "seconds": earlier,
            "points": [_entry(run, self.forecasts[run.folder]) for run in self.plan.runs],
            "tuning": _tuning_entry(self.plan, self.forecasts),
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
        """Keep what came of a run, and choose where its group is complete."""
        error = result.get("error")
        job.entry["status"], job.entry["error"] = ("failed", error) if error else ("done", None)
        if error:
            errors = self.folder.path / "errors"
            errors.mkdir(exist_ok=True)
            write_atomically(errors / f"{job.run.folder.replace('/', '-')}.txt", result.get("traceback") or error)
        self.progress.on_end(job.run, result.get("summary"), error)
        if job.group is not None:
            self._choose(job.group)
        self.save()

    def save(self) -> None:
        """Write study.json."""
        self.state["seconds"] = self._earlier + time.perf_counter() - self.started
        self.folder.write(self.state)

    def failed(self) -> list[dict[str, Any]]:
        """Return what study.json says of every run that failed."""
        return [entry for entry in all_entries(self.state) if entry["status"] == "failed"]

    def _add(self, job: _Job) -> None:
        if job.entry["status"] == "failed":  # by its forecast
            self.progress.on_end(job.run, None, job.entry["error"])
        elif self.folder.find(job.run) == "done":
            job.entry["status"] = "done"
        else:
            self.queue.append(job)

    def _choose(self, number: int) -> None:
        """Choose for a group whose candidates are all there, and queue its runs."""
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
        best = choose(scores)
        entry["complete"] = True
        if best is not None:
            entry["chosen"] = group.candidates[best][0]
            # The best may lie beyond the candidates.
            values = [value for value, _ in group.candidates]
            if len(values) > 2 and all(isinstance(value, int | float) for value in values):
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


def run_study(plan: Plan, path: str | Path, progress: StudyProgress | None = None) -> dict[str, Any]:
    """Execute a plan, or go on with it: what is done and unchanged stays.

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
        If no run can be, or there is no room for one.
    RunError
        If runs failed; the others are done.
    """
    progress = progress or StudyProgress()
    folder = StudyFolder(path)
    try:
        candidates = [run for group in plan.groups for _, run in group.candidates]
        execution = _Execution(plan, folder, forecast_all([*plan.runs, *candidates]), progress)
        execution.prepare()
        if execution.queue:
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
    started = start_ray(_address(study))
    runners: set[Any] = set()
    starting: dict[Any, Any] = {}  # reference -> runner
    running: dict[Any, tuple[_Job, Any]] = {}
    idle: list[Any] = []

    def start() -> None:
        runner = _start(study, config)
        runners.add(runner)
        starting[runner.ready.remote()] = runner

    try:
        left = sum(entry["status"] == "planned" for entry in all_entries(execution.state))
        for _ in range(min(left, count_runs(study, config))):
            start()
        while execution.queue or running:
            while execution.queue and idle:
                job, runner = execution.queue.popleft(), idle.pop()
                job.entry["status"] = "running"
                folder = str(execution.folder.path.resolve())
                running[runner.run.remote(job.run.config.to_toml(), folder, job.run.folder)] = (job, runner)
                execution.progress.on_start(job.run)
                execution.save()
            ready, _ = ray.wait([*running, *starting], num_returns=1, timeout=_LOOK_SECONDS)
            for reference in ready:
                if reference in starting:
                    # Only a process that has begun gets a run: one that the cluster has no room for would keep it.
                    idle.append(_begun(reference, starting.pop(reference)))
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
                rounds = _rounds(execution.folder.path / job.run.folder)
                if rounds != job.rounds:
                    job.rounds = rounds
                    execution.progress.on_round(job.run, rounds)
    finally:
        for job, _ in running.values():
            job.entry["status"] = "planned"
        execution.save()
        for runner in runners:
            ray.kill(runner)
        if started:
            ray.shutdown()


def _begun(reference: Any, runner: Any) -> Any:
    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        raise RunError(f"a process for runs cannot be started: {str(error).strip()}") from None
    return runner


def _start(study: Study, config: Config) -> Any:
    section = config.simulation
    memory = int(study.budget.memory_per_run * 2**30)
    actor = ray.remote(num_cpus=section.cpus_per_worker, num_gpus=section.gpus_per_worker, memory=memory)(Runner)
    return actor.remote(section.cpus_per_worker, section.gpus_per_worker, sys.argv)


def count_runs(study: Study, config: Config) -> int:
    """Say how many runs fit side by side into the running Ray cluster, by cores, GPUs and memory.

    Raises
    ------
    InputError
        If not even one fits.
    """
    section = config.simulation
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needs = {
        "CPU": (float(section.cpus_per_worker), "simulation.cpus_per_worker", section.cpus_per_worker),
        "GPU": (section.gpus_per_worker, "simulation.gpus_per_worker", section.gpus_per_worker),
        "memory": (study.budget.memory_per_run * 2**30, "budget.memory_per_run", study.budget.memory_per_run),
    }

    def fit(resources: dict[str, float], names: tuple[str, ...]) -> int:
        room = {name: resources.get(name, 0) / needs[name][0] for name in names if needs[name][0]}
        if 0 < section.gpus_per_worker < 1 and "GPU" in room:
            # A run's share is of one GPU.
            room["GPU"] = int(resources.get("GPU", 0)) * int(1 / section.gpus_per_worker + 1e-9)
        return int(min(room.values()) + 1e-9)

    for name, (_, key, value) in needs.items():
        if needs[name][0] and not any(fit(resources, (name,)) for resources in nodes):
            most = max((resources.get(name, 0) for resources in nodes), default=0)
            there = f"{most / 2**30:.1f} GiB" if name == "memory" else f"{most:g}"
            if name == "GPU" and not most:
                raise InputError(key, value, "Ray sees no GPU; set it to 0 to run on the CPU")
            raise InputError(key, value, f"no machine has room for one run (the most there is: {there}); lower it")
    room = sum(fit(resources, tuple(needs)) for resources in nodes)
    if not room:
        raise InputError("budget.memory_per_run", study.budget.memory_per_run, "no machine has room for one run")
    return min(room, study.budget.runs or room)


def capacity(plan: Plan) -> tuple[int, int]:
    """Say how many runs go side by side here, and on how many GPUs (0: on cores), as a study would.

    Raises
    ------
    InputError
        If not even one fits.
    """
    started = start_ray(_address(plan.study))
    try:
        config = plan.runs[0].config
        there = sum(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
        gpus = max(1, int(there)) if config.simulation.gpus_per_worker else 0
        return count_runs(plan.study, config), gpus
    finally:
        if started:
            ray.shutdown()


def _address(study: Study) -> str | None:
    address: str | None = study.base.get("simulation", {}).get("address")
    return address


def _rounds(folder: Path) -> int:
    try:
        return (folder / "rounds.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def _entry(run: Run, expected: Forecast | InputError) -> dict[str, Any]:
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
        "seed": tuning.seed,
        "validation": plan.runs[0].config.data.validation,
        "cost": cost([]),
        "groups": [_group_entry(group, plan, forecasts) for group in plan.groups],
    }


def _group_entry(group: Group, plan: Plan, forecasts: dict[str, Forecast | InputError]) -> dict[str, Any]:
    return {
        "values": group.values,
        "chosen": None,
        "at_edge": False,
        "complete": False,
        # Looking at private validation data costs privacy that no run's epsilon counts.
        "covered_by_privacy": False if group.private else None,
        "cost": cost([]),
        "points": [plan.runs[place].name for place in group.points],
        "candidates": [{"value": value, **_entry(run, forecasts[run.folder])} for value, run in group.candidates],
    }


def _sum(costs: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(entry[name] for entry in costs) for name in costs[0]}
