"""What summary.json says, as titles and values for a terminal or a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.tasks import Task


def result_rows(facts: Mapping[str, Any], task: Task, folder: Path) -> list[tuple[str, str]]:
    """Return titles and values of a finished run.

    Parameters
    ----------
    facts : Mapping
        The content of summary.json.
    task : Task
    folder : Path
    """
    rows = score_rows(facts["final"], task)
    if facts.get("test_examples"):
        rows.append(("tested on", examples_words(facts["test_examples"], task)))
    if facts.get("personalised"):
        rows.append(("scored", "each client's own model, on its own test examples" if rows else "nothing"))
    if facts.get("best"):
        best = facts["best"]
        rows.append(
            ("best", f"{task.show(task.primary, best.get(task.primary))} on validation, after round {best['round']}")
        )
    if facts["epsilon"]:
        e = facts["epsilon"]
        covers = "" if e["covers_init"] else "; the start is not covered"
        rows.append(("epsilon", f"{format_epsilon(e['max'])} at delta {e['delta']:g}, {e['unit']}{covers}"))
    traffic = facts["communication"]
    up, down, once = (format_bytes(traffic[f"{way}_bytes"]) for way in ("uplink", "downlink", "initial"))
    rows.append(("bytes", f"{up} up, {down} down, {once} once"))
    flower = traffic.get("flower")
    if flower:
        moved = flower["sent_bytes"] + flower["received_bytes"]
        rows.append(("moved", f"{format_bytes(moved)} by Flower, {flower['overhead']:+.1%} to the messages above"))
    rows.append(("trained", f"{facts['trainable_parameters']:,} parameters"))
    rows.append(("seconds", f"{facts['seconds']['total']:.1f}"))
    rows.append(("folder", str(folder)))
    return rows


def score_rows(metrics: Mapping[str, Any], task: Task) -> list[tuple[str, str]]:
    """Return titles and values of the primary metric, with its baseline, and of the task's other metrics."""
    names = [task.primary, *(name for name in task.scores if name != task.primary)]
    rows = {name: task.show(name, metrics[name]) for name in names if name in metrics}
    if task.baseline is not None and task.primary in rows and task.baseline.metric in rows:
        rows[task.primary] += f" ({task.baseline.title} {rows.pop(task.baseline.metric)})"
    return list(rows.items())


def examples_words(count: int, task: Task) -> str:
    """Say of how many examples a score is, and what one of them is worth, where that is the same for each."""
    metric = task.scores[task.primary]
    each = f", so one is {100 / count:.2g} points of {task.primary.replace('_', ' ')}" if metric.of_examples else ""
    return format_count(count, "example") + each


def sent_bytes(traffic: Mapping[str, Any]) -> int:
    """Return the bytes of all messages: sent once, down and up."""
    return sum(int(traffic[f"{way}_bytes"]) for way in ("initial", "downlink", "uplink"))


def format_epsilon(value: float | None) -> str:
    """Format the epsilon of summary.json; None means that it has no bound."""
    return "infinite" if value is None else f"{value:.3f}"


def format_count(count: int, noun: str) -> str:
    """Write a number of things: ``1 run``, ``2 runs``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def format_bytes(count: float) -> str:
    """Format a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
