"""Output of a study: its plan, and a line for each run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora.cli.dry_run import noise_range, rank_list
from fedlora.cli.phases import PhaseDisplay
from fedlora.cli.tables import print_line, print_table
from fedlora.errors import InputError
from fedlora.privacy.banded import band_advice
from fedlora.privacy.units import unit_advice
from fedlora.study.forecast import Forecast, estimate_seconds, forecast_all
from fedlora.study.plan import Plan, PlannedRun
from fedlora.study.run_processes import capacity
from fedlora.study.runner import StudyProgress
from fedlora.study.state import all_entries, check_output, is_unchanged, read_state
from fedlora.summaries import format_bytes, format_count, format_epsilon
from fedlora.tasks import get_task
from fedlora.timeline import format_seconds


class StudyDisplay:
    """Prints what comes of a study's runs.

    Parameters
    ----------
    phases : PhaseDisplay
        Shows what goes on between them.

    Attributes
    ----------
    progress : StudyProgress
        Hooks for :func:`fedlora.study.run_study`.
    """

    def __init__(self, phases: PhaseDisplay) -> None:
        self.phases = phases
        self.progress = StudyProgress(
            on_plan=self._plan, on_end=self._end, on_widen=self._widen, on_choice=self._choice
        )

    def summary(self, state: dict[str, Any], folder: Path) -> None:
        """Print what tuning chose and cost, and the study's folder."""
        tuning = state["tuning"]
        if tuning:
            spent = tuning["cost"]
            took = f"{spent['seconds']:.0f} s, {format_bytes(spent['bytes'])}"
            self._print(
                f"tuning      {format_count(spent['runs'], 'run')}, {took}, on "
                f"validation data at seed{'s' * (len(tuning['seeds']) > 1)} {', '.join(map(str, tuning['seeds']))}"
            )
            if any(group["covered_by_privacy"] is False for group in tuning["groups"]):
                self._print("            epsilon does not cover the tuning runs on private data")
        self._print(f"runs        {sum(point['status'] == 'done' for point in state['points'])}")
        self._print(f"seconds     {state['seconds']:.1f}")
        self._print(f"folder      {folder}")

    def _plan(self, total: int, done: int) -> None:
        if done:
            self._print(f"{done} of {total} runs are done already")

    def _end(self, run: PlannedRun, summary: dict[str, Any] | None, error: str | None) -> None:
        if summary is None:
            self._print(f"{run.folder}  failed: {error}")
            return
        final, traffic = summary["final"], summary["communication"]
        facts = []
        if run.folder.startswith("runs/"):  # tuning never reads test examples
            task = get_task(run.config.model.task)
            whose = " of clients' own models" if summary.get("personalised") else ""
            facts.append(f"{task.primary}{whose} {task.show(task.primary, final.get(task.primary))}")
        if summary["epsilon"]:
            facts.append(f"epsilon {format_epsilon(summary['epsilon']['max'])}")
        sent = sum(traffic[f"{way}_bytes"] for way in ("initial", "downlink", "uplink"))
        facts += [f"sent {format_bytes(sent)}", f"{summary['seconds']['total']:.1f} s"]
        self._print(f"{run.folder}  {'  '.join(facts)}")

    def _widen(self, group: dict[str, Any], value: Any, runs: int) -> None:
        self._print(f"for {_shown(group['values'])} the best candidate is at the edge; {value} is tried too")

    def _choice(self, group: dict[str, Any]) -> None:
        if group["chosen"] is None:
            return
        edge = " (at the edge of its candidates)" if group["at_edge"] else ""
        self._print(f"chosen for {_shown(group['values'])}: {group['chosen']}{edge}")

    def _print(self, line: str) -> None:
        self.phases.say(line)


def show_dry_run(console: Console, plan: Plan, folder: Path) -> None:
    """Print the planned runs: payload bytes by direction, steps, noise multipliers and status; then the estimated time.

    Parameters
    ----------
    console : Console
    plan : Plan
    folder : Path
        The study's folder; nothing is written.

    Raises
    ------
    InputError
        If every run is impossible.
    """
    check_output(folder)
    runs = [*(run for group in plan.groups for _, run in group.candidates), *plan.runs]
    forecasts = forecast_all(runs)
    there = {entry["run"]: entry for entry in all_entries(read_state(folder))}
    numbers = ("trained", "once", "down", "up", "steps", "noise multiplier", "ranks")
    rows, missing = [], []
    for run in runs:
        entry = there.get(run.folder, {})
        status = entry.get("status", "planned")
        if status == "done" and not is_unchanged(plan, run, entry, folder):
            status = "changed"
        if status != "done":
            missing.append(run)
        rows.append((run.folder, *_cells(forecasts[run.folder], status)))
    print_table(console, ("run", *numbers, "status"), rows, right=numbers, whole=True)
    for name, one in forecasts.items():
        if isinstance(one, Forecast):
            for advice in filter(None, (unit_advice(one.unit_noise), band_advice(one.band_noise))):
                print_line(console, f"{name}: {advice}")
    if any(group.private for group in plan.groups):
        print_line(console, "epsilon will not cover the tuning runs: they look at private data to choose")
    expected = [forecasts[run.folder] for run in runs]
    sent = sum(one.payload_bytes for one in expected if isinstance(one, Forecast))
    tuning = len(runs) - len(plan.runs)
    added = f" and {format_count(tuning, 'tuning run')}" if tuning else ""
    if plan.study.tuning is not None and plan.study.tuning.widen:
        most = plan.study.tuning.widen * len(plan.study.tuning.seeds) * len(plan.groups)
        added += f" (up to {most} more where the best candidate is at an edge)"
    print_line(
        console, f"{format_count(len(plan.runs), 'run')}{added}, {format_bytes(sent)} of payload, {len(missing)} to go"
    )
    try:
        at_once, gpus = capacity(plan)
    except InputError as error:
        # A plan may be printed on another machine than the one that will run it.
        print_line(console, f"they cannot run here, so there is no estimate of the time: {error}")
        return
    seconds = estimate_seconds(missing, forecasts, at_once, gpus)
    print_line(
        console,
        f"about {format_seconds(seconds)} on this machine, {at_once} in parallel, from one measured step of each kind",
    )


def _cells(expected: Forecast | InputError, status: str) -> list[str]:
    if isinstance(expected, InputError):
        return [*["-"] * 7, f"impossible: {expected}"]
    return [
        f"{expected.trainable_parameters:,}",
        f"{expected.initial_bytes:,}",
        f"{expected.downlink_bytes:,}",
        f"{expected.uplink_bytes:,}",
        f"{expected.steps:,}",
        noise_range(expected),
        rank_list(expected),
        status,
    ]


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "all runs"
