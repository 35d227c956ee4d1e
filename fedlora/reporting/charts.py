"""The content of each figure, independent of the library that draws it (matplotlib for files, plotly for the page)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedlora.communication.links import PROFILES
from fedlora.reporting.budgets import COSTS, MeanStep, front, has_validation, mean_steps
from fedlora.reporting.comparison import (
    Comparison,
    Group,
    Mean,
    axis_label,
    client_scores,
    flatten,
    group_epsilon,
)
from fedlora.reporting.runs import FinishedRun

_SHARES = np.linspace(0, 1, 21)
_PARTITIONS, _CLIENTS = 4, 60
_DODGE = 1.03


@dataclass(frozen=True)
class Series:
    """Points of one method in a panel.

    Attributes
    ----------
    method : str or None
        None if the points belong to no method, for example a class of examples.
    label : str
    x, y : list of float
    low, high : list of float, optional
        95 % interval of y, where there is one.
    hover : list of str
        Hover text of each point; may contain line breaks.
    of : list of str
        Names of the groups or runs that the points stand for.
    variant : int
        Index among the method's series, which sets dashes and open markers.
    line, markers, band : bool
        Whether to join the points, to mark them, and to draw the interval as a band instead of bars.
    strong : list of bool, optional
        Which points stand out; all by default.
    sizes : list of float, optional
        Marker sizes, in points.
    flat : bool
        Draw markers as horizontal strokes, for values of a formula.
    step : bool
        Join the points by steps: a value holds until the next point.
    """

    method: str | None
    label: str
    x: list[float]
    y: list[float]
    hover: list[str]
    of: list[str]
    low: list[float | None] | None = None
    high: list[float | None] | None = None
    variant: int = 0
    line: bool = False
    markers: bool = True
    band: bool = False
    strong: list[bool] | None = None
    sizes: list[float] | None = None
    flat: bool = False
    step: bool = False


@dataclass(frozen=True)
class Panel:
    """Two axes and their series.

    Attributes
    ----------
    x_form, y_form : str
        How numbers are shown: percent, bytes, seconds, integer or number.
    x_quantity, y_quantity : str
        Quantity on each axis: a name of :func:`~fedlora.reporting.comparison.quantities`, or round, share or client.
    x_ticks : dict of float to str, optional
    bars : bool
        Series are stacked bars: x is a client, y its examples of a class.
    dodge : bool
        Draw series of equal x side by side, so that their intervals do not overlap.
    """

    title: str
    x_title: str
    y_title: str
    series: list[Series]
    x_quantity: str
    y_quantity: str
    x_form: str = "number"
    y_form: str = "number"
    x_log: bool = False
    y_log: bool = False
    x_ticks: dict[float, str] | None = None
    bars: bool = False
    dodge: bool = False

    def shifted(self, place: int) -> list[float]:
        """Return the x values at which to draw a series, shifted sideways if ``dodge`` is set."""
        series = self.series[place]
        factor = _DODGE ** (place - (len(self.series) - 1) / 2) if self.dodge else 1.0
        return [x * factor for x in series.x]

    @property
    def x_axis(self) -> Axis:
        """Scale, ticks and range of the x axis."""
        return Axis.of([x for s in self.series for x in s.x], self.x_form, self.x_log, self.x_ticks)

    @property
    def y_axis(self) -> Axis:
        """Scale, ticks and range of the y axis, which shows all intervals, clipped to [0, 1] for shares."""
        if self.bars:
            return Axis(False)
        values = [y for s in self.series for part in (s.y, s.low, s.high) for y in part or [] if y is not None]
        return Axis.of(values, self.y_form, self.y_log, None)


@dataclass(frozen=True)
class Axis:
    """Scale, ticks and range of an axis; None leaves the choice to the drawing library.

    Attributes
    ----------
    log : bool
    ticks : dict of float to str, optional
    range : (float, float), optional
        Limits, where values could exceed what the axis can show.
    """

    log: bool
    ticks: dict[float, str] | None = None
    range: tuple[float, float] | None = None

    @classmethod
    def of(cls, values: Sequence[float], form: str, log: bool, ticks: dict[float, str] | None) -> Axis:
        """Choose ticks for values of a form (see :class:`Panel`)."""
        known = sorted({value for value in values if math.isfinite(value)})
        if ticks is not None or not known:
            return cls(log, ticks)
        if form == "percent" and (known[0] < 0 or known[-1] > 1):
            return cls(False, None, (max(0.0, known[0]) - 0.02, min(1.0, known[-1]) + 0.02))
        if form == "integer" and all(value.is_integer() for value in known):
            step = -(-int(known[-1] - known[0] + 1) // 6)
            marks = [value for value in known if (value - known[0]) % step == 0]
            return cls(False, {value: f"{value:,.0f}" for value in marks})
        if not log:
            return cls(False)
        low, high = known[0], known[-1]
        if low <= 0:
            return cls(False)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
            marks = [step * 10.0**power for power in decades for step in steps]
            marks = [mark for mark in marks if low * 0.8 <= mark <= high * 1.25]
            if len(marks) >= 3:
                thin = -(-len(marks) // 6)
                return cls(True, {mark: format_value(mark, form) for mark in marks[::thin]})
        # Too narrow for powers of ten to help.
        return cls(False)


@dataclass(frozen=True)
class Chart:
    """One figure: file name, title, caption and panels."""

    name: str
    title: str
    caption: str
    panels: list[Panel] = field(default_factory=list)


def charts(comparison: Comparison) -> list[Chart]:
    """Return the figures for which the runs have data, the main one first."""
    makers = (
        score_by_epsilon,
        score_by_bytes,
        pareto_front,
        front_by_bytes,
        front_by_epsilon,
        front_by_seconds,
        score_by_round,
        score_by_network,
        bytes_by_round,
        drift_by_round,
        client_spread,
        partitions,
    )
    made = [chart for maker in makers if (chart := maker(comparison)) is not None and chart.panels]
    return [chart for chart in made if any(panel.series for panel in chart.panels)]


def score_by_epsilon(comparison: Comparison) -> Chart | None:
    """Score against epsilon; runs without privacy at the right end."""
    if len(comparison.privacy_levels) < 2:
        return None
    positions = epsilon_positions(comparison)
    ticks = {}
    for level in comparison.privacy_levels:
        place = positions[next(g.name for g in comparison.groups if g.privacy == level)]
        ticks[place] = level.removeprefix("ε ")
    panel = _score_panel(
        comparison,
        "",
        "epsilon (largest of the clients)",
        "epsilon_max",
        [
            _points(comparison, groups, lambda g: positions[g.name], line=True)
            for groups in _by_variant(comparison.groups)
        ],
        x_log=True,
        x_ticks=ticks,
        dodge=True,
    )
    caption = "The stricter the privacy, the further left; points of one epsilon are drawn side by side. " + _intervals(
        comparison
    )
    return Chart("score-epsilon", f"{_title(comparison)} against epsilon", caption, [panel])


def score_by_bytes(comparison: Comparison) -> Chart:
    """Score against bytes in all, up, down and once."""
    panels = []
    for title, quantity in (
        ("all messages", "total_bytes"),
        ("uplink", "uplink_bytes"),
        ("downlink", "downlink_bytes"),
        ("initial broadcast, once a client", "initial_bytes"),
    ):
        series = [
            _points(comparison, groups, lambda g, q=quantity: g.means[q].mean, sized=True)  # type: ignore[misc]
            for groups in _by_variant([g for g in comparison.groups if g.means[quantity].mean > 0])
        ]
        form = {"x_form": "bytes", "x_log": True}
        panels.append(_score_panel(comparison, title, "bytes, all clients and rounds", quantity, series, **form))
    caption = "Whole messages as measured. " + _size_note(comparison) + _intervals(comparison)
    return Chart("score-bytes", f"{_title(comparison)} against bytes", caption, [p for p in panels if p.series])


def pareto_front(comparison: Comparison) -> Chart:
    """Score against bytes, with the Pareto front of score, epsilon and bytes marked."""
    front = {group.name for group in comparison.front}
    series = [
        _points(
            comparison,
            groups,
            lambda g: g.means["total_bytes"].mean,
            sized=True,
            strong=lambda g: g.name in front,
        )
        for groups in _by_variant(comparison.groups)
    ]
    panel = _score_panel(
        comparison, "", "bytes, all clients and rounds", "total_bytes", series, x_form="bytes", x_log=True
    )
    caption = (
        f"Full colour: no other is at least as good in {comparison.score_title}, epsilon and bytes at once, "
        "and better in one. "
        "Pale: another is. By the means alone: seeds may change places. " + _size_note(comparison)
    )
    return Chart("pareto", f"Pareto front of {comparison.score_title}, epsilon and bytes", caption, [panel])


def front_by_bytes(comparison: Comparison) -> Chart:
    """Best score so far against the bytes spent so far, a panel a level of privacy."""
    return _fronts(comparison, "front-bytes", "bytes", "bytes")


def front_by_epsilon(comparison: Comparison) -> Chart:
    """Best score so far against the epsilon spent so far, of all private runs."""
    return _fronts(comparison, "front-epsilon", "epsilon", "epsilon")


def front_by_seconds(comparison: Comparison) -> Chart:
    """Best score so far against the seconds spent so far, a panel a level of privacy."""
    return _fronts(comparison, "front-seconds", "seconds", "time")


def _fronts(comparison: Comparison, name: str, cost: str, words: str) -> Chart:
    """Draw what each budget of a cost buys: the points that no other dominates, joined by steps."""
    by_panel: dict[str, dict[str, list[MeanStep]]] = defaultdict(lambda: defaultdict(list))
    for level in comparison.privacy_levels:
        for group in comparison.groups:
            if group.privacy == level and (found := mean_steps(group, cost)):
                by_panel["" if cost == "epsilon" else level][group.method] += found
    panels = []
    for level, by_method in by_panel.items():
        title = level if len(by_panel) > 1 else ""
        form = {"x_form": COSTS[cost].form, "x_log": cost != "epsilon"}
        series = _front_series(comparison, by_method, cost)
        panels.append(_score_panel(comparison, title, COSTS[cost].title, cost, series, **form))
    validated = all(map(has_validation, comparison.runs))
    by = "the validation examples" if validated else "its test score, which makes every curve optimistic"
    caption = (
        f"A method's steps: the best {comparison.score_title} for what was spent so far, over all its configurations. "
        f"Grey: the best of all methods; points on it are in full colour. Means over seeds; the best round so far of a "
        f"run is chosen by {by}."
    )
    return Chart(name, f"Best {comparison.score_title} for a budget of {words}", caption, panels)


def _front_series(comparison: Comparison, by_method: dict[str, list[MeanStep]], cost: str) -> list[Series]:
    maximize, form = comparison.task.maximize, comparison.task.form(comparison.score)

    def on_front(found: list[MeanStep]) -> list[MeanStep]:
        return [found[i] for i in front([(step.cost, step.score.mean) for step in found], maximize)]

    def hover(step: MeanStep) -> str:
        shown = format_value(step.cost, COSTS[cost].form)
        return f"{step.group.name}\nround {step.round}, {cost} {shown}\n{with_interval(step.score, form)}"

    def series(method: str | None, label: str, found: list[MeanStep]) -> Series:
        x, y = [step.cost for step in found], [step.score.mean for step in found]
        of = [step.group.name for step in found]
        return Series(method, label, x, y, list(map(hover, found)), of, line=True, step=True)

    best = on_front([step for found in by_method.values() for step in found])
    drawn = [replace(series(None, "best of all", best), markers=False)] if len(by_method) > 1 else []
    for method, found in by_method.items():
        own = on_front(found)
        drawn.append(replace(series(method, method, own), strong=[step in best for step in own]))
    return drawn


def score_by_round(comparison: Comparison) -> Chart:
    """Score over rounds, a panel a level of privacy."""
    name = comparison.score
    form = comparison.task.form(name)
    series = _over_rounds(comparison, lambda run: {line.round: line.score(name) for line in run.rounds}, form)
    panels = [
        _score_panel(comparison, level if len(series) > 1 else "", "round", "round", of_level, x_form="integer")
        for level, of_level in series.items()
    ]
    caption = f"On the test set. {_intervals(comparison)}"
    return Chart("score-rounds", f"{_title(comparison)} over rounds", caption, panels)


def drift_by_round(comparison: Comparison) -> Chart:
    """Client drift over rounds, a panel a level of privacy."""
    series = _over_rounds(comparison, lambda run: {line.round: line.drift for line in run.rounds}, "number")
    panels = [
        Panel(
            level if len(series) > 1 else "",
            "round",
            "client drift",
            of_level,
            "round",
            "drift",
            x_form="integer",
            y_log=True,
        )
        for level, of_level in series.items()
    ]
    caption = (
        "Sum over clients of p |dᵢ − d|² / |d|²: dᵢ is what client i changed in the arrays that are trained, d the "
        "clients' mean and p a client's share of the examples. 0: all clients agree. Under DP the noise is part of it. "
        f"{_intervals(comparison)}"
    )
    return Chart("drift", "Client drift", caption, [panel for panel in panels if panel.series])


def bytes_by_round(comparison: Comparison) -> Chart:
    """Measured bytes a round beside the method's formula; privacy changes neither."""
    panels = []
    variants = _by_variant(comparison.groups)
    for title, way in (("uplink", "up"), ("downlink", "down"), ("initial broadcast", "initial")):
        series = []
        for groups in variants:
            runs = [run for group in groups for run in group.runs]
            measured, formula = (_round_bytes(runs, way, name) for name in ("message_bytes", "formula_bytes"))
            if not any(measured.values()):
                continue
            of = groups[0].label
            for values, label, line in ((formula, "formula", True), (measured, "measured", False)):
                hover = [
                    f"{of}\nround {number}\n{label} {format_value(value, 'bytes')}" for number, value in values.items()
                ]
                series.append(
                    Series(
                        groups[0].method,
                        f"{of} · {label}",
                        [float(number) for number in values],
                        list(values.values()),
                        hover,
                        [of] * len(values),
                        variant=groups[0].variant,
                        line=line,
                        flat=line,
                    )
                )
        if series:
            panels.append(
                Panel(
                    title,
                    "round",
                    "bytes, all clients",
                    series,
                    "round",
                    f"{way}_bytes",
                    "integer",
                    "bytes",
                    y_log=True,
                )
            )
    caption = (
        "Markers: whole messages as measured. Strokes and lines: the payload that the method's formula gives. The "
        "difference is names, array headers, metrics and metadata. Mean over seeds and levels of privacy."
    )
    return Chart("bytes-rounds", "Bytes a round beside the formula", caption, panels)


def score_by_network(comparison: Comparison) -> Chart:
    """Score against the simulated network time, one panel for each link profile."""
    names = dict.fromkeys(
        name.removeprefix("seconds_") for g in comparison.groups for name in g.means if name.startswith("seconds_")
    )
    panels = []
    for name in names:
        with_it = [group for group in comparison.groups if f"seconds_{name}" in group.means]
        series = [
            _points(comparison, groups, lambda g, n=name: g.means[f"seconds_{n}"].mean, sized=True)  # type: ignore[misc]
            for groups in _by_variant(with_it)
        ]
        title = PROFILES[name].title if name in PROFILES else "links of the config"
        form = {"x_form": "seconds", "x_log": True}
        panels.append(_score_panel(comparison, title, "seconds, all rounds", f"seconds_{name}", series, **form))
    caption = (
        "Simulated: what the measured messages take on links whose rates and latencies are drawn for each client from "
        "log-normal distributions. A round lasts as long as its slowest client; training is not counted. "
        + _size_note(comparison)
        + _intervals(comparison)
    )
    return Chart("score-network", f"{_title(comparison)} against time on the network", caption, panels)


def client_spread(comparison: Comparison) -> Chart | None:
    """Distribution of the final model's score over clients, from worst to best."""
    by_level: dict[str, list[Series]] = defaultdict(list)
    task, name = comparison.task, comparison.task.client_metric
    form = task.form(name)
    for group in comparison.groups:
        values = [client_scores(run) for run in group.runs]
        if not all(values):
            continue
        curves = np.array([np.quantile(of_run, _SHARES) for of_run in values])
        means = [Mean.of(column.tolist()) for column in curves.T]
        hover = [
            f"{group.name}\n{share:.0%} of the clients have at most {format_value(mean.mean, form)}"
            for share, mean in zip(_SHARES, means, strict=True)
        ]
        by_level[group.privacy].append(_curve(group, _SHARES.tolist(), means, hover, markers=False))
    levels = [level for level in comparison.privacy_levels if level in by_level]
    panels = [
        Panel(
            level if len(levels) > 1 else "",
            "share of the clients, worst first"
            if comparison.task.better_high(name)
            else "share of the clients, best first",
            f"{name.replace('_', ' ')} on the client's own examples",
            by_level[level],
            "share",
            f"client_{name}",
            x_form="percent",
            y_form=form,
        )
        for level in levels
    ]
    caption = (
        "The final model on the examples that each client trains on, or holds out to test on; a flat line is fair. "
        f"Computed without noise: no epsilon covers it. {_intervals(comparison)}"
    )
    return Chart("fairness", f"{name.replace('_', ' ').capitalize()} by client", caption, panels)


def partitions(comparison: Comparison) -> Chart | None:
    """Examples of each client by class: one figure for each partition, of its first seed."""
    panels: dict[tuple[object, ...], Panel] = {}
    for run in comparison.runs:
        flat = flatten(run.config)
        keys = [key for key in flat if key.startswith("data.") and key in comparison.varied]
        way = tuple(str(flat[key]) for key in keys)
        if run.partition and way not in panels and len(panels) < _PARTITIONS:
            title = " · ".join(axis_label(key, flat[key]) for key in keys)
            panels[way] = _partition_panel(run, f"{title}, seed {run.config.run.seed}".lstrip(", "))
    if not panels:
        return None
    caption = "Drawn from the clients' examples: no epsilon covers it."
    return Chart("partition", "Who holds which examples", caption, list(panels.values()))


def _partition_panel(run: FinishedRun, title: str) -> Panel:
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    names = {line.client: line.name for line in run.partition}
    for line in run.partition:
        counts[line.label][line.client] += line.examples
    order = sorted(names)
    if len(order) > _CLIENTS:
        # Too many bars for one page: sort the clients by size, largest first.
        order.sort(key=lambda client: -sum(of_client[client] for of_client in counts.values()))
    series = [
        Series(
            None,
            label or "examples",
            [float(place) for place in range(len(order))],
            [float(of_client[client]) for client in order],
            [f"client {names[client]}\n{of_client[client]} {label or 'examples'}" for client in order],
            [run.name] * len(order),
            variant=number,
        )
        for number, (label, of_client) in enumerate(counts.items())
    ]
    ticks = {float(place): names[client] for place, client in enumerate(order)} if len(order) <= 12 else None
    x_title = "client" if len(order) <= _CLIENTS else f"{len(order)} clients, largest first"
    return Panel(
        title, x_title, "examples", series, "client", "examples", "integer", "integer", x_ticks=ticks, bars=True
    )


def epsilon_positions(comparison: Comparison) -> dict[str, float]:
    """Place groups on a logarithmic axis of epsilon; those without privacy a step to the right of all others."""
    known = {group.name: group_epsilon(group) for group in comparison.groups}
    finite = [value for value in known.values() if math.isfinite(value) and value > 0]
    step = max(2.0, (max(finite) / min(finite)) ** 0.35) if finite else 2.0
    none = max(finite, default=1.0) * step
    return {name: value if math.isfinite(value) else none for name, value in known.items()}


def format_value(value: float, form: str) -> str:
    """Show a number: percent, bytes, seconds, integer or number."""
    if not math.isfinite(value):
        return "–"
    if form == "percent":
        return f"{100 * value:.1f} %"
    if form == "bytes":
        for unit in ("B", "kB", "MB", "GB"):
            if abs(value) < 999.5 or unit == "GB":
                return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
            value /= 1000
    if form == "seconds":
        return f"{value:.3g} s" if value < 999.5 else f"{value:,.0f} s"
    if form == "integer":
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def describe(comparison: Comparison, group: Group) -> str:
    """Return the hover text of a group's point: config, score, epsilon and bytes, one a line."""
    flat = flatten(group.runs[0].config)
    beside = [key for key in comparison.varied if key not in group.axes and key != "client.learning_rate"]
    score, total = group.means[comparison.score], group.means["total_bytes"]
    rows = [
        group.name,
        *(axis_label(key, flat[key]) for key in beside if key in flat),
        f"learning rate {flat['client.learning_rate'] or 'default'}",
        f"{comparison.score_title} {with_interval(score, comparison.task.form(comparison.score))}",
        f"sent {format_value(total.mean, 'bytes')}",
    ]
    if "epsilon_max" in group.means:
        rows.append(f"epsilon {format_value(group.means['epsilon_max'].mean, 'number')}")
    rows.append(f"seeds {', '.join(str(run.config.run.seed) for run in group.runs)}")
    return "\n".join(rows)


def with_interval(mean: Mean, form: str) -> str:
    """Format a mean with its interval, if any, and its number of values."""
    shown = format_value(mean.mean, form)
    if mean.half is None:
        return f"{shown} (n = 1)"
    half = format_value(mean.half, form)
    return f"{shown} ± {half} (n = {mean.n})"


def _points(
    comparison: Comparison,
    groups: Sequence[Group],
    x: Callable[[Group], float],
    *,
    line: bool = False,
    sized: bool = False,
    strong: Callable[[Group], bool] | None = None,
) -> Series:
    levels = comparison.privacy_levels
    means = [group.means[comparison.score] for group in groups]
    return Series(
        groups[0].method,
        groups[0].label,
        [x(group) for group in groups],
        [mean.mean for mean in means],
        [describe(comparison, group) for group in groups],
        [group.name for group in groups],
        [mean.low for mean in means],
        [mean.high for mean in means],
        groups[0].variant,
        line=line,
        strong=[strong(group) for group in groups] if strong else None,
        sizes=[7.0 + 2.5 * levels.index(group.privacy) for group in groups] if sized and len(levels) > 1 else None,
    )


def _over_rounds(
    comparison: Comparison, values: Callable[[FinishedRun], dict[int, float | None]], form: str
) -> dict[str, list[Series]]:
    """Return mean and interval for each round that all runs of a group have, by privacy level."""
    by_level: dict[str, list[Series]] = {level: [] for level in comparison.privacy_levels}
    for group in comparison.groups:
        of_runs = [values(run) for run in group.runs]
        rounds = [
            number
            for number in of_runs[0]
            if all((value := of_run.get(number)) is not None and math.isfinite(value) for of_run in of_runs)
        ]
        means = [Mean.of([of_run[number] for of_run in of_runs]) for number in rounds]  # type: ignore[misc]
        if not rounds:
            continue
        hover = [
            f"{group.name}\nround {number}\n{with_interval(mean, form)}"
            for number, mean in zip(rounds, means, strict=True)
        ]
        x = [float(number) for number in rounds]
        by_level[group.privacy].append(_curve(group, x, means, hover, markers=len(x) <= 30))
    return by_level


def _curve(group: Group, x: list[float], means: Sequence[Mean], hover: list[str], markers: bool) -> Series:
    """Return a group's means as a line, with their interval as a band."""
    return Series(
        group.method,
        group.label,
        x,
        [mean.mean for mean in means],
        hover,
        [group.name] * len(x),
        [mean.low for mean in means],
        [mean.high for mean in means],
        group.variant,
        line=True,
        markers=markers,
        band=True,
    )


def _round_bytes(runs: Sequence[FinishedRun], way: str, name: str) -> dict[int, float]:
    """Mean over runs of the bytes of all clients in a round."""
    sums: dict[int, float] = defaultdict(float)
    for run in runs:
        for row in run.messages:
            if row.direction == way:
                sums[row.round] += getattr(row, name)
    return {number: value / len(runs) for number, value in sorted(sums.items())}


def _by_variant(groups: Iterable[Group]) -> list[list[Group]]:
    by_label: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_label[group.label].append(group)
    return list(by_label.values())


def _score_panel(
    comparison: Comparison, title: str, x_title: str, quantity: str, series: list[Series], **options: object
) -> Panel:
    form = comparison.task.form(comparison.score)
    label = f"test {comparison.score_title}"
    return Panel(title, x_title, label, series, quantity, comparison.score, y_form=form, **options)  # type: ignore[arg-type]


def _title(comparison: Comparison) -> str:
    return comparison.score_title.capitalize()


def _intervals(comparison: Comparison) -> str:
    counts = sorted({len(group.runs) for group in comparison.groups})
    if counts == [1]:
        return "One seed: no intervals."
    shown = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Mean and 95 % interval over {shown} seeds."


def _size_note(comparison: Comparison) -> str:
    return "The larger the marker, the weaker the privacy. " if len(comparison.privacy_levels) > 1 else ""
