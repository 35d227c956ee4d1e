"""How runs are told on a terminal: a line a round, a result, sizes, and a small curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.config import NODES, Config
from fedlora.summaries import format_bytes, format_count, result_rows, sent_bytes
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


def config_rows(config: Config, nodes: int | None = None) -> list[tuple[str, str]]:
    """Return the titles and values of a run's method, model, task and data; ``nodes`` is their number, if known."""
    partition = config.data.partition
    owners = f"{format_count(partition.clients or 0, 'client')}, {partition.kind}"
    if partition.kind == "natural":
        owners = f"one client for each {partition.column}"
    if config.data.name == NODES:
        owners = "a client a node" if nodes is None else format_count(nodes, "node")
    return [
        ("task", config.model.task),
        ("model", config.model.name),
        ("data", f"{config.data.name}, {owners}"),
        ("method", f"{config.method.name}, rank {config.method.rank}"),
    ]


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
    rows = result_rows(facts, task, folder)
    width = max(12, *(len(name) + 1 for name, _ in rows))
    return [f"{name.replace('_', ' '):<{width}}{value}" for name, value in rows]


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


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
