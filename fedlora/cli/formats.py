"""How runs are told on a terminal: a line a round, a result, sizes, and a small curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def header() -> str:
    """Return the heading of a table of rounds."""
    return "  ".join(name.rjust(width) for name, width in COLUMNS)


def round_cells(line: Mapping[str, Any], task: Task) -> list[str]:
    """Return the cells of :data:`COLUMNS` for a line of rounds.jsonl."""
    metrics = line["metrics"]
    return [
        str(line["round"]),
        _number(line["train_loss"], 4),
        _number(metrics.get("loss"), 4),
        task.show(task.primary, metrics.get(task.primary)),
        _number(line["epsilon"], 3),
        format_bytes(sent_bytes(line["communication"])),
        str(len(line["failed"])),
        f"{sum(line['seconds'].values()):.1f}",
    ]


def round_lines(line: Mapping[str, Any], task: Task) -> list[str]:
    """Return what is printed of a round: its row, which clients failed, and why it does not count."""
    row = zip(round_cells(line, task), COLUMNS, strict=True)
    lines = ["  ".join(cell.rjust(width) for cell, (_, width) in row)]
    for failure in line["failed"]:
        reason = str(failure["error"]).strip().rpartition("\n")[2]
        lines.append(f"client {failure['client']} failed: {reason}")
    if line.get("uncounted"):
        lines.append(f"round {line['round']} does not count: {line['uncounted']}")
    return lines


def result_lines(facts: Mapping[str, Any], task: Task, folder: Path) -> list[str]:
    """Return what is printed of a finished run.

    Parameters
    ----------
    facts : Mapping
        The content of summary.json.
    task : Task
    folder : Path
    """
    rows = score_rows(facts["final"], task)
    if facts.get("personalised"):
        rows.append(("scored", "each client's own model, on its own test examples" if rows else "nothing"))
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
    rows.append(("trained", f"{facts['trainable_parameters']:,} numbers"))
    rows.append(("seconds", f"{facts['seconds']['total']:.1f}"))
    rows.append(("folder", str(folder)))
    width = max(12, *(len(name) + 1 for name, _ in rows))
    return [f"{name.replace('_', ' '):<{width}}{value}" for name, value in rows]


def score_rows(metrics: Mapping[str, Any], task: Task) -> list[tuple[str, str]]:
    """Return titles and values of the primary metric, with its baseline, and of the task's other metrics."""
    names = [task.primary, *(name for name in task.scores if name != task.primary)]
    rows = {name: task.show(name, metrics[name]) for name in names if name in metrics}
    if task.baseline is not None and task.primary in rows and task.baseline.metric in rows:
        rows[task.primary] += f" ({task.baseline.title} {rows.pop(task.baseline.metric)})"
    return list(rows.items())


def curve(
    points: Sequence[tuple[int, float]], labels: tuple[str, str], width: int, *, plain: bool = False
) -> list[str]:
    """Draw a curve of block characters.

    Parameters
    ----------
    points : sequence of (int, float)
        Rounds and values, of increasing rounds; two or more different values.
    labels : tuple of str
        The smallest and the largest value, as they are shown.
    width : int
        Columns at most; where there are more points, the last ones of equal stretches are drawn.
    plain : bool
        Draw with ASCII characters alone.
    """
    low, high = min(value for _, value in points), max(value for _, value in points)
    margin = max(map(len, ("round", *labels)))
    room = max(1, width - margin - 3)
    count = min(len(points), room)
    kept = [points[(i + 1) * len(points) // count - 1] for i in range(count)]
    bar = max(1, min(6, room // count))
    blocks = " #" if plain else " ▁▂▃▄▅▆▇█"
    steps = len(blocks) - 1
    # The smallest value is one step high, so that every point is seen.
    heights = [1 + round((value - low) / (high - low) * (_ROWS * steps - 1)) for _, value in kept]
    lines = []
    for row in reversed(range(_ROWS)):
        label = labels[1] if row == _ROWS - 1 else labels[0] if row == 0 else ""
        cells = "".join(blocks[max(0, min(steps, height - row * steps))] * bar for height in heights)
        lines.append(f"{label:>{margin}} | {cells}".rstrip())
    first, last = str(kept[0][0]), str(kept[-1][0])
    gap = max(1, count * bar - len(first) - len(last))
    return [
        *lines,
        f"{'round':>{margin}}   {first}{' ' * gap}{last}" if count > 1 else f"{'round':>{margin}}   {first}",
    ]


_ROWS = 4


def sent_bytes(traffic: Mapping[str, Any]) -> int:
    """Return the bytes of all messages: sent once, down and up."""
    return sum(int(traffic[f"{way}_bytes"]) for way in ("initial", "downlink", "uplink"))


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


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
