"""Terminal output of a run: a progress bar and a table of rounds. Without a terminal, only the table."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedlora.errors import plain_text
from fedlora.results.folder import RunResult
from fedlora.strategies.callbacks import Progress as Hooks
from fedlora.tasks import Task

COLUMNS = (
    ("round", 5),
    ("train loss", 10),
    ("test loss", 9),
    ("score", 8),
    ("epsilon", 8),
    ("sent", 9),
    ("failed", 6),
    ("seconds", 7),
)


_LONGEST_LINE = 20_000  # characters


class RunDisplay:
    """Shows the progress of a run.

    Parameters
    ----------
    console : Console
    task : Task
        The run's task, which formats its scores.

    Attributes
    ----------
    progress : fedlora.strategies.callbacks.Progress
        Hooks for :func:`fedlora.simulate`.
    """

    def __init__(self, console: Console, task: Task) -> None:
        self.console, self.task = console, task
        self.progress = Hooks(on_start=self._start, on_client=self._client, on_round=self._round, on_note=self._print)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._clients_a_round = 0
        self._started = self._header_shown = False

    def __enter__(self) -> RunDisplay:
        self._bar.start()
        self._rounds = self._bar.add_task("starting", total=None, note="")
        self._clients = self._bar.add_task("clients", total=None, note="", visible=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def summary(self, result: RunResult) -> None:
        """Print the result, and the folder that holds it."""
        if not self._started:
            self._print("finished already; nothing was left to do")
        facts, rows = result.summary, score_rows(result.summary["final"], self.task)
        if facts.get("personalised"):
            rows.append(("scored", "each client's own model, on its own test examples" if rows else "nothing"))
        if facts["epsilon"]:
            e = facts["epsilon"]
            covers = "" if e["covers_init"] else "; the start is not covered"
            rows.append(("epsilon", f"{format_epsilon(e['max'])} at delta {e['delta']:g}, {e['unit']}{covers}"))
        up, down, once = (
            format_bytes(facts["communication"][f"{way}_bytes"]) for way in ("uplink", "downlink", "initial")
        )
        rows.append(("bytes", f"{up} up, {down} down, {once} once"))
        flower = facts["communication"].get("flower")
        if flower:
            moved = flower["sent_bytes"] + flower["received_bytes"]
            rows.append(("moved", f"{format_bytes(moved)} by Flower, {flower['overhead']:+.1%} to the messages above"))
        rows.append(("trained", f"{facts['trainable_parameters']:,} numbers"))
        rows.append(("seconds", f"{facts['seconds']['total']:.1f}"))
        rows.append(("folder", str(result.folder)))
        width = max(12, *(len(name) + 1 for name, _ in rows))
        for name, value in rows:
            self._print(f"{name.replace('_', ' '):<{width}}{value}")

    def _start(self, rounds: int, first: int, clients: int) -> None:
        self._started = True
        self._clients_a_round = clients
        self._bar.update(self._rounds, description="rounds", total=rounds, completed=first)
        self._bar.update(self._clients, total=clients, completed=0, visible=True)

    def _client(self, client: int) -> None:
        self._bar.advance(self._clients)

    def _round(self, line: dict[str, Any]) -> None:
        if not self._header_shown:
            self._header_shown = True
            self._print("  ".join(name.rjust(width) for name, width in COLUMNS))
        metrics = line["metrics"]
        traffic = line["communication"]
        sent = traffic["initial_bytes"] + traffic["downlink_bytes"] + traffic["uplink_bytes"]
        score = self.task.show(self.task.primary, metrics.get(self.task.primary))
        cells = (
            str(line["round"]),
            _number(line["train_loss"], 4),
            _number(metrics.get("loss"), 4),
            score,
            _number(line["epsilon"], 3),
            format_bytes(sent),
            str(len(line["failed"])),
            f"{sum(line['seconds'].values()):.1f}",
        )
        self._print("  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)))
        for failure in line["failed"]:
            reason = str(failure["error"]).strip().rpartition("\n")[2]
            self._print(f"client {failure['client']} failed: {reason}")
        if line.get("uncounted"):
            self._print(f"round {line['round']} does not count: {line['uncounted']}")
        note = f"loss {cells[1]}  score {cells[3]}  epsilon {cells[4]}  sent {cells[5]}"
        self._bar.update(self._rounds, completed=line["round"], note=note)
        self._bar.reset(self._clients, total=self._clients_a_round)

    def _print(self, line: str) -> None:
        # Without wrapping or markup: a path may be wider than the terminal, and contain brackets.
        self.console.print(plain_text(line, _LONGEST_LINE), markup=False, highlight=False, soft_wrap=True)


def score_rows(metrics: Mapping[str, Any], task: Task) -> list[tuple[str, str]]:
    """Return titles and values of the primary metric, with its baseline, and of the task's other metrics."""
    names = [task.primary, *(name for name in task.scores if name != task.primary)]
    rows = {name: task.show(name, metrics[name]) for name in names if name in metrics}
    if task.baseline is not None and task.primary in rows and task.baseline.metric in rows:
        rows[task.primary] += f" ({task.baseline.title} {rows.pop(task.baseline.metric)})"
    return list(rows.items())


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def format_epsilon(value: float | None) -> str:
    """Format the epsilon of summary.json; None means that it has no bound."""
    return "infinite" if value is None else f"{value:.3f}"


def format_bytes(count: float) -> str:
    """Format a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
