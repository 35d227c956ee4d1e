"""``fedlora show`` and ``fedlora runs``: look at runs again, finished or not, from their folders alone."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from fedlora.cli.formats import config_rows, curve, header, result_lines, round_lines
from fedlora.cli.tables import aligned, print_line, print_table
from fedlora.config import Config, input_error, read_toml
from fedlora.config.schema import COMMON_KEYS
from fedlora.errors import InputError
from fedlora.summaries import format_bytes, format_epsilon, sent_bytes
from fedlora.tasks import Task, get_task

console = Console()

_CURVE_WIDTH = 78
_NOT_LISTED = ("tuning", "replaced", "report", "checkpoint")
"""Folders below which there are no runs to look at: a study's tuning, and runs that it no longer plans."""


@dataclass(frozen=True)
class _Run:
    """What a run folder says: its config, its rounds so far, and its summary once it is finished."""

    folder: Path
    config: Config
    rounds: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def task(self) -> Task:
        return get_task(self.config.model.task)

    @property
    def done(self) -> str:
        return f"{len(self.rounds)}/{self.config.run.rounds}"

    @property
    def state(self) -> str:
        """``finished``, ``running`` in another process, or ``unfinished``."""
        if self.summary is not None:
            return "finished"
        return "running" if _is_locked(self.folder / "checkpoint" / "state.sqlite") else "unfinished"


def _is_locked(database: Path) -> bool:
    """Whether a process has a checkpoint open."""
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True, timeout=0)) as connection:
            connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
    return False


def show(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder; the run need not be finished.")],
    every: Annotated[int | None, typer.Option(min=1, help="Print every N-th round; about 20 by default.")] = None,
) -> None:
    """Print a run: its rounds, a small curve of its score, scores by domain, epsilon and bytes."""
    run = _read(folder)
    _print(*_about(run), "")
    step = every or max(1, len(run.rounds) // 20)
    if run.rounds:
        _print(header())
    for number, line in enumerate(run.rounds, 1):
        if number % step == 0 or number in (1, len(run.rounds)) or line["failed"] or line.get("uncounted"):
            _print(*round_lines(line, run.task))
    _print(*_curves(run))
    if run.state == "running":
        _print("", "still running: a process has its checkpoint open")
        return
    if run.summary is None:
        _print("", f"not finished; continue with: fedlora run {folder}/config.toml --output {folder} --resume")
        return
    _print(*_by_domain(run.summary["final"], run.task), "")
    _print(*result_lines(run.summary, run.task, folder), *_more(run.summary))


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="A folder of runs, or a study.")] = Path("runs"),
) -> None:
    """List the runs below a folder: state, score, epsilon, bytes and time. Tuning runs of studies are left out."""
    found = sorted(path.parent for path in folder.rglob("config.toml") if _is_listed(path.parent, folder))
    if not found:
        raise InputError("FOLDER", str(folder), "holds no run; give a folder that contains runs")
    numbers = ("rounds", "score", "epsilon", "sent", "seconds")
    rows, unread = [], []
    for path in found:
        name = path.relative_to(folder)
        try:
            rows.append(_cells(_read(path), name))
        except InputError as error:
            unread.append(f"{name}  cannot be read: {error.remedy}")
    print_table(console, ("run", "method", "model", *numbers), rows, right=numbers, whole=True)
    _print(*unread)


def _is_listed(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return not (path / "study.toml").is_file() and not any(p in _NOT_LISTED or p.startswith(".") for p in parts)


def _cells(run: _Run, name: Path) -> list[str]:
    """Return a run's row: of an unfinished run what its last round says."""
    last = run.rounds[-1] if run.rounds else None
    metrics = (
        run.summary["final"] if run.summary else next((r["metrics"] for r in run.rounds[::-1] if r["metrics"]), {})
    )
    score = run.task.show(run.task.primary, metrics.get(run.task.primary))
    spent = run.summary["epsilon"] if run.summary else None
    epsilon = format_epsilon(spent["max"]) if spent else "-"
    if run.summary is None and last is not None and last["epsilon"] is not None:
        epsilon = format_epsilon(last["epsilon"])
    traffic = run.summary["communication"] if run.summary else last and last["communication"]
    seconds = run.summary["seconds"]["total"] if run.summary else None
    return [
        str(name) if name.parts else run.folder.resolve().name,
        run.config.method.name,
        Path(run.config.model.name).name,
        run.done if run.summary else f"{run.done} {run.state}",
        f"{score} {run.task.primary}",
        epsilon,
        format_bytes(sent_bytes(traffic)) if traffic else "-",
        "-" if seconds is None else f"{seconds:.0f}",
    ]


def _read(folder: Path) -> _Run:
    """Read a run folder.

    Raises
    ------
    InputError
        If it is none, or its files are damaged.
    """
    if not (folder / "config.toml").is_file() or (folder / "study.toml").is_file():
        raise InputError("RUN", str(folder), "is no run folder: it has no config.toml; fedlora runs lists runs")
    try:
        # Without the method's own keys: its import takes seconds, and it need not be installed here.
        config = Config.model_validate(read_toml(folder / "config.toml"), context=COMMON_KEYS)
    except ValidationError as error:
        raise InputError("RUN", str(folder), f"its config.toml cannot be used ({input_error(error)})") from None
    rounds, summary = folder / "rounds.jsonl", folder / "summary.json"
    try:
        text = rounds.read_text(encoding="utf-8") if rounds.is_file() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        facts = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None
        run = _Run(folder, config, lines, facts)
        for line in lines:
            round_lines(line, run.task)
        if facts is not None:
            result_lines(facts, run.task, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError("RUN", str(folder), f"its rounds or its summary are damaged ({why}); run again") from None
    return run


def _about(run: _Run) -> list[str]:
    config, privacy = run.config, run.config.privacy
    nodes = run.summary["clients"] if run.summary else None
    state = "" if run.summary else f", {run.state}"
    rows = [
        ("run", f"{run.folder}, {run.done} rounds{state}, seed {config.run.seed}"),
        *config_rows(config, nodes),
    ]
    if privacy.mode != "none":
        aim = f"noise multiplier {privacy.noise_multiplier:g}" if privacy.noise_multiplier is not None else ""
        aim = f"target epsilon {privacy.target_epsilon:g}" if privacy.target_epsilon is not None else aim
        rows.append(("privacy", f"{privacy.mode}, {aim}, {privacy.accountant}"))
    else:
        rows.append(("privacy", "none"))
    return [f"{name:<12}{value}" for name, value in rows]


def _curves(run: _Run) -> list[str]:
    """Return a small curve of the score by round, where it was measured and moved."""
    name = run.task.primary
    points = [(0, run.summary["start"].get(name))] if run.summary and run.summary.get("start") else []
    points += [(line["round"], line["metrics"].get(name)) for line in run.rounds]
    known = [(number, float(value)) for number, value in points if value is not None]
    values = [value for _, value in known]
    if len(set(values)) < 2:
        return []
    plain = not (console.encoding or "ascii").lower().startswith("utf")
    ends = (run.task.show(name, min(values)), run.task.show(name, max(values)))
    return ["", f"{name.replace('_', ' ')} by round", *curve(known, ends, _CURVE_WIDTH, plain=plain)]


def _by_domain(final: Mapping[str, Any], task: Task) -> list[str]:
    """Return the table of the score by domain: a column a domain, and a row a model where there are several."""
    tables = final.get("by_domain")
    if not tables:
        return []
    if not all(isinstance(values, Mapping) for values in tables.values()):
        tables = {"model": tables}
    domains = list(dict.fromkeys(domain for values in tables.values() for domain in values))
    rows = [["", *domains]]
    rows += [
        [name, *(task.show(task.primary, values.get(domain)) for domain in domains)] for name, values in tables.items()
    ]
    return ["", f"{task.primary} by domain", *aligned(rows, [False, *[True] * len(domains)])]


def _more(facts: Mapping[str, Any]) -> list[str]:
    """Return what ``fedlora run`` does not print at its end: the mean epsilon, the formula, where the time went."""
    rows, traffic = [], facts["communication"]
    if facts["epsilon"]:
        spent = facts["epsilon"]
        rows.append(("mean spent", f"{format_epsilon(spent['mean'])} of the clients, by {spent['accountant']}"))
    rows.append(("payload", f"{traffic['payload_bytes']:,} bytes, {traffic['formula_bytes']:,} by the formula"))
    parts = ", ".join(f"{name} {value:.1f}" for name, value in facts["seconds"].items() if name != "total")
    rows.append(("time", f"{parts} seconds"))
    return [f"{name:<12}{value}" for name, value in rows]


def _print(*lines: str) -> None:
    for line in lines:
        print_line(console, line)
