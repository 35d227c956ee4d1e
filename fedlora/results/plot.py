"""Plot one run: score, losses, bytes and epsilon by round, and scores by domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.figures.chart import Chart, Panel, Series, format_value
from fedlora.figures.style import COLOURS
from fedlora.tasks import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]
"""Of rounds.jsonl."""

_WAYS = {"once": "initial_bytes", "down": "downlink_bytes", "up": "uplink_bytes"}
_WAY_COLOURS = {"once": COLOURS["grey"], "down": COLOURS["green"], "up": COLOURS["purple"]}
_MANY_ROUNDS = 40
"""From so many evaluations on, lines are drawn without markers."""


def plot_rounds(
    path: Path,
    lines: Lines,
    title: str,
    task: Task,
    start: Mapping[str, Any] | None = None,
    target_epsilon: float | None = None,
) -> None:
    """Write :func:`draw_rounds` as a PNG."""
    from fedlora.figures.draw import saved

    path.write_bytes(saved(draw_rounds(lines, title, task, start, target_epsilon)))


def draw_rounds(
    lines: Lines,
    title: str,
    task: Task,
    start: Mapping[str, Any] | None = None,
    target_epsilon: float | None = None,
) -> Figure:
    """Draw the lines of rounds.jsonl: :func:`rounds_chart`, or a table where there is a single round."""
    from fedlora.figures.draw import figure_of, table_figure

    if len(lines) == 1:
        heads = ["", *(["before training"] if start else []), f"after round {lines[0]['round']}"]
        return table_figure(title, heads, rounds_table(lines[0], task, start, target_epsilon))
    return figure_of(rounds_chart(lines, title, task, start, target_epsilon))


def rounds_chart(
    lines: Lines,
    title: str,
    task: Task,
    start: Mapping[str, Any] | None = None,
    target_epsilon: float | None = None,
) -> Chart:
    """Return a run's rounds as a chart: score, losses, bytes so far, and epsilon, if any.

    Parameters
    ----------
    lines : sequence of mapping
        Of rounds.jsonl.
    title : str
    task : Task
    start : mapping, optional
        Metrics before the first round: ``start`` of summary.json.
    target_epsilon : float, optional
        Drawn as a line.
    """
    tested = ([(0.0, start)] if start else []) + [(float(line["round"]), line["metrics"]) for line in lines]
    panels = [_scores(tested, task), _losses(lines, tested, task), _bytes(lines)]
    if any(line["epsilon"] is not None for line in lines):
        panels.append(_epsilon(lines, target_epsilon))
    # The same rounds in all of them.
    ends = tuple(x for panel in panels for series in panel.series for x in series.x)
    words = "round (0: before training)" if start else "round"
    return Chart("rounds", title, "", [replace(panel, x_title=words, x_beside=ends) for panel in panels], keys=True)


def rounds_table(
    line: Mapping[str, Any], task: Task, start: Mapping[str, Any] | None, target_epsilon: float | None
) -> list[list[str]]:
    """Return what a single round's chart would show: a quantity a row, before training, if known, and after."""
    metrics, name, sent = line["metrics"], task.primary, line["communication"]
    rows: list[tuple[str, str, Any, Any]] = [
        (f"test {name.replace('_', ' ')}", task.form(name), (start or {}).get(name), metrics.get(name)),
        (f"test loss ({task.loss_unit})", "number", (start or {}).get("loss"), metrics.get("loss")),
        (f"training loss ({task.loss_unit})", "number", None, line["train_loss"]),
    ]
    if task.baseline is not None:
        rows.insert(1, (task.baseline.title, task.form(name), None, metrics.get(task.baseline.metric)))
    rows += [(f"sent {way}", "bytes", None, sent[key]) for way, key in _WAYS.items()]
    if line["epsilon"] is not None:
        target = "" if target_epsilon is None else f" (target {target_epsilon:g})"
        rows.append((f"epsilon{target}", "number", None, line["epsilon"]))
    return [
        [label, *([_shown(before, form)] if start else []), _shown(after, form)] for label, form, before, after in rows
    ]


def plot_by_domain(
    path: Path, final: Mapping[str, Any], title: str, task: Task, start: Mapping[str, Any] | None
) -> None:
    """Draw the final scores by model and domain as a PNG, if there are any."""
    from fedlora.figures.draw import draw

    panel = domain_panel("", domain_tables(final, start), task, title)
    if panel is None:
        return
    caption = f"{task.primary.replace('_', ' ').capitalize()} by domain"
    path.write_bytes(draw(Chart("domains", f"{title}\n{caption}", "", [panel]), dpi=150, endings=("png",))["png"])


def domain_tables(final: Mapping[str, Any], start: Mapping[str, Any] | None) -> dict[str, dict[str, float]]:
    """Return the primary score by model and domain; the first row is what the others are compared with.

    That is the model before training, or, where a run evaluated several models, the public one.
    """
    found = final.get("by_domain") or {}
    if all(isinstance(values, Mapping) for values in found.values()):
        first = [name for name in found if name == "public"]
        return {name: dict(found[name]) for name in [*first, *(name for name in found if name not in first)]}
    before = (start or {}).get("by_domain") or {}
    return ({"before training": dict(before)} if before else {}) | {"after training": dict(found)}


def domain_panel(title: str, tables: Mapping[str, Mapping[str, float]], task: Task, of: str) -> Panel | None:
    """Return scores by model and domain as a table, coloured by how much better each is than the first row's.

    Parameters
    ----------
    title : str
    tables : mapping of str to mapping of str to float
        Score by model and domain, as :func:`domain_tables` gives them.
    task : Task
    of : str
        The run or group.
    """
    domains = list(dict.fromkeys(domain for values in tables.values() for domain in values))
    if not domains:
        return None
    first = next(iter(tables.values()))
    gains = {
        name: [_gain(first.get(domain), values.get(domain), task) for domain in domains]
        for name, values in tables.items()
    }
    largest = max((abs(gain) for row in gains.values() for gain in row), default=0.0) or 1.0
    form = task.form(task.primary)
    series = [
        Series(
            None,
            name,
            [float(place) for place in range(len(domains))],
            [values.get(domain, math.nan) for domain in domains],
            [f"{name} on {domain}\n{_shown(values.get(domain), form)}" for domain in domains],
            [of] * len(domains),
            shades=[gain / largest for gain in gains[name]],
        )
        for name, values in tables.items()
    ]
    ticks = {float(place): domain for place, domain in enumerate(domains)}
    quantities = ("domain", task.primary)
    key = f"domain (blue: better than {next(iter(tables))}, orange: worse)" if len(tables) > 1 else "domain"
    return Panel(title, key, "model", series, *quantities, y_form=form, x_ticks=ticks, kind="table")


def _scores(tested: Sequence[tuple[float, Mapping[str, Any]]], task: Task) -> Panel:
    name, form = task.primary, task.form(task.primary)
    words = name.replace("_", " ")
    series = [_curve("test", tested, name, COLOURS["blue"], form)]
    series.append(_curve("validation", _validated(tested), name, COLOURS["orange"], form))
    if task.baseline is not None:
        of = {metrics[task.baseline.metric] for _, metrics in tested if task.baseline.metric in metrics}
        ends = [number for number, metrics in tested if metrics]
        series += [_level(f"{task.baseline.title} {_shown(v, form)}", ends, v) for v in of if v is not None]
    return _by_round(words.capitalize(), "" if form == "percent" else words, series, form)


def _validated(tested: Sequence[tuple[float, Mapping[str, Any]]]) -> list[tuple[float, Mapping[str, Any]]]:
    """Return the metrics on the validation examples, by round; empty ones where a run has none."""
    return [(number, metrics.get("validation") or {}) for number, metrics in tested]


def _losses(lines: Lines, tested: Sequence[tuple[float, Mapping[str, Any]]], task: Task) -> Panel:
    trained = [(float(line["round"]), {"loss": line["train_loss"]}) for line in lines]
    series = [
        _curve("test", tested, "loss", COLOURS["blue"], "number"),
        _curve("validation", _validated(tested), "loss", COLOURS["orange"], "number"),
        _curve("training", trained, "loss", COLOURS["vermilion"], "number", variant=1),
    ]
    return _by_round("Loss", f"{task.loss_unit}", series, "number")


def _bytes(lines: Lines) -> Panel:
    """Bytes so far, stacked: what goes down and up is often the same, and would be one line."""
    series = []
    for way, key in _WAYS.items():
        sent = [(float(line["round"]), line["communication"]) for line in lines]
        total = format_value(lines[-1]["communication"][key], "bytes")
        series.append(_curve(f"{way} {total}", sent, key, _WAY_COLOURS[way], "bytes"))
    return _by_round("Sent so far", "", series, "bytes", kind="areas", from_zero=True)


def _epsilon(lines: Lines, target: float | None) -> Panel:
    spent = [(float(line["round"]), line) for line in lines]
    series = [_curve("spent", spent, "epsilon", COLOURS["blue"], "number")]
    if target is not None:
        series.append(_level(f"target {target:g}", [spent[0][0], spent[-1][0]], target))
    return _by_round("Epsilon of the client that spent most", "", series, "number", from_zero=True)


def _by_round(title: str, y_title: str, series: list[Series], form: str, **options: Any) -> Panel:
    known = [each for each in series if each.x]
    return Panel(title, "round", y_title, known, "round", title, x_form="integer", y_form=form, **options)


def _curve(
    label: str, points: Sequence[tuple[float, Mapping[str, Any]]], key: str, colour: str, form: str, variant: int = 0
) -> Series:
    """Return one quantity over the rounds that have it."""
    known = [(x, float(of[key])) for x, of in points if of.get(key) is not None and math.isfinite(of[key])]
    x, y = [x for x, _ in known], [y for _, y in known]
    hover = [f"{label}\nround {number:.0f}\n{format_value(value, form)}" for number, value in known]
    markers = len(known) < _MANY_ROUNDS
    return Series(None, label, x, y, hover, [""] * len(x), variant=variant, line=True, markers=markers, colour=colour)


def _level(label: str, x: Sequence[float], y: float) -> Series:
    """Return a dashed line at one height."""
    ends = [min(x), max(x)]
    return Series(None, label, ends, [y, y], [label] * 2, [""] * 2, variant=1, line=True, markers=False)


def _gain(first: float | None, value: float | None, task: Task) -> float:
    """Return how much better a score is than the first: a logarithm of the ratio where they are positive."""
    if first is None or value is None or not (math.isfinite(first) and math.isfinite(value)):
        return 0.0
    more = math.log(value / first) if min(first, value) > 0 else value - first
    return more if task.better_high(task.primary) else -more


def _shown(value: Any, form: str) -> str:
    if value is None:
        return "–"
    # In a column, numbers have as many digits each.
    return f"{value:#.3g}".rstrip(".") if form == "number" and abs(value) < 999.5 else format_value(value, form)
