"""The figures of a report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from fedlora.communication.links import PROFILES
from fedlora.data.partition_plot import partition_panel
from fedlora.figures.chart import Chart, Panel, Series, aligned, format_value, untangled
from fedlora.reporting.budgets import COSTS, MeanStep, front, has_validation, mean_steps
from fedlora.reporting.comparison import (
    Comparison,
    Group,
    Mean,
    axis_label,
    client_scores,
    flatten,
    group_epsilon,
    pareto,
)
from fedlora.reporting.runs import FinishedRun
from fedlora.results.plot import domain_panel, domain_tables

_SHARES = np.linspace(0, 1, 21)
_PARTITIONS, _DOMAINS = 4, 4
_ALL_BYTES = "bytes, all clients and rounds"


def charts(comparison: Comparison) -> list[Chart]:
    """Return the figures for which the runs have data, the main one first."""
    divided = (
        score_by_epsilon,
        score_by_bytes,
        pareto_front,
        score_by_round,
        score_by_network,
        bytes_by_round,
        drift_by_round,
        client_spread,
    )
    whole = (front_by_bytes, front_by_epsilon, front_by_seconds, scores_by_domain, partitions)
    made = {maker: _in_facets(maker, comparison) for maker in divided} | {maker: maker(comparison) for maker in whole}
    order = (*divided[:3], *whole[:3], divided[3], whole[3], *divided[4:], whole[4])
    found = [chart for maker in order if (chart := made[maker]) is not None and chart.panels]
    return [chart for chart in found if any(map(_compares, chart.panels))]


def _compares(panel: Panel) -> bool:
    """Whether a panel has more than a single point, which the table of results says better."""
    points = {(x, of) for series in panel.series for x, of in zip(series.x, series.of, strict=True)}
    return bool(panel.series) and (panel.kind != "points" or len(points) > 1)


def _in_facets(maker: Callable[[Comparison], Chart | None], comparison: Comparison) -> Chart | None:
    """Make a figure; of many configurations as small multiples, whose axes are the same."""
    chart = maker(comparison)
    if chart is None or len(comparison.facets) == 1:
        return chart and untangled(chart)
    made = {title: maker(facet) for title, facet in comparison.facets.items()}
    parts = {title: part.panels for title, part in made.items() if part is not None}
    panels = [
        replace(panel, title=f"{title} · {panel.title}" if panel.title else title)
        for title, of in parts.items()
        for panel in of
    ]
    columns = max(map(len, parts.values()))
    return untangled(replace(chart, panels=aligned(panels), columns=columns if 1 < columns <= 4 else None))


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
        ("initial broadcast", "initial_bytes"),
    ):
        series = [
            _points(comparison, groups, lambda g, q=quantity: g.means[q].mean, sized=True)  # type: ignore[misc]
            for groups in _by_variant([g for g in comparison.groups if g.means[quantity].mean > 0])
        ]
        form = {"x_form": "bytes", "x_log": True}
        panels.append(_score_panel(comparison, title, _ALL_BYTES, quantity, series, **form))
    caption = "Whole messages as measured. " + _size_note(comparison) + _intervals(comparison)
    return Chart("score-bytes", f"{_title(comparison)} against bytes", caption, [p for p in panels if p.series])


def pareto_front(comparison: Comparison) -> Chart:
    """Score against bytes, a panel a level of privacy, with the Pareto front as steps."""
    panels = []
    for level in comparison.privacy_levels:
        groups = [group for group in comparison.groups if group.privacy == level]
        known = [group for group in groups if comparison.costs(group)[0] < math.inf]
        on_front = [known[i] for i in pareto([comparison.costs(group)[::2] for group in known])]
        on_front.sort(key=_total_bytes)
        best = {group.name for group in on_front}
        series = [
            replace(
                _points(comparison, of, _total_bytes, strong=lambda g, best=best: g.name in best),  # type: ignore[misc]
                low=None,
                high=None,
            )
            for of in _by_variant(groups)
        ]
        if on_front:
            series.insert(0, _front_steps(comparison, on_front))
        title = level if len(comparison.privacy_levels) > 1 else ""
        form = {"x_form": "bytes", "x_log": True}
        panels.append(_score_panel(comparison, title, _ALL_BYTES, "total_bytes", series, **form))
    caption = (
        f"Steps: the best {comparison.score_title} within a number of bytes, at a level of privacy. Pale: another "
        "one is at least as good in both, and better in one. Means over seeds; single seeds may differ."
    )
    return Chart("pareto", f"Pareto front of {comparison.score_title} and bytes", caption, aligned(panels))


def _front_steps(comparison: Comparison, on_front: Sequence[Group]) -> Series:
    """Join a front's points by steps, up to the most bytes of all."""
    of = [*on_front, on_front[-1]]
    x = [*map(_total_bytes, on_front), max(map(_total_bytes, comparison.groups))]
    y = [group.means[comparison.score].mean for group in of]
    names = [group.name for group in of]
    return Series(None, "front", x, y, names, names, line=True, markers=False, step=True)


def _total_bytes(group: Group) -> float:
    return group.means["total_bytes"].mean


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
        f"Steps: the best {comparison.score_title} of a method within the budget, over all its configurations. "
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
        "Sum over clients of p |dᵢ − d|² / |d|²: dᵢ is client i's change of the trained arrays, d the clients' mean "
        "and p a client's share of the examples. 0: all clients agree. Under DP the noise is part of it. "
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
            of, caption = groups[0].label, groups[0].caption
            for values, label, line in ((formula, "formula", True), (measured, "measured", False)):
                hover = [
                    f"{of}\nround {number}\n{label} {format_value(value, 'bytes')}" for number, value in values.items()
                ]
                series.append(
                    Series(
                        groups[0].method,
                        f"{caption} · {label}",
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
        "Simulated: the time that the measured messages take on links with rates and latencies drawn for each client "
        "from log-normal distributions. A round lasts as long as its slowest client; training is not counted. "
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
        "The final model on the examples that each client trains on, or holds out to test on. The flatter, the fairer. "
        f"Computed without noise: epsilon does not cover it. {_intervals(comparison)}"
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
    caption = "Computed from the clients' examples: epsilon does not cover it."
    return Chart("partition", "Who holds which examples", caption, list(panels.values()))


def _partition_panel(run: FinishedRun, title: str) -> Panel:
    names = {line.client: line.name for line in run.partition}
    clients, labels = sorted(names), list(dict.fromkeys(line.label for line in run.partition))
    counts = np.zeros((len(clients), len(labels)), np.int64)
    for line in run.partition:
        counts[clients.index(line.client), labels.index(line.label)] += line.examples
    shown = None if labels == [""] else labels
    return partition_panel(title, counts, shown, [names[client] for client in clients], run.name)


def scores_by_domain(comparison: Comparison) -> Chart | None:
    """Primary score of every model of a run on every domain."""
    task = comparison.task
    panels: list[Panel] = []
    for group in comparison.groups:
        tables = [domain_tables(run.summary.final, run.summary.start) for run in group.runs]
        mean = {
            model: {
                domain: Mean.of([float(table[model][domain]) for table in tables]).mean
                for domain in tables[0][model]
                if all(table[model].get(domain) is not None for table in tables)
            }
            for model in tables[0]
            if all(model in table for table in tables)
        }
        title = group.name if len(comparison.groups) > 1 else ""
        if (panel := domain_panel(title, mean, task, group.name)) is not None and len(panels) < _DOMAINS:
            series = [replace(series, method=group.method) for series in panel.series]
            panels.append(replace(panel, series=series))
    caption = (
        "Rows are models, columns are domains of the test examples. Blue: better than the first row; orange: worse. "
        "Means over seeds."
    )
    if len(panels) < len(comparison.groups):
        caption += f" The first {len(panels)} configurations that have domains."
    words = task.primary.replace("_", " ").capitalize()
    return Chart("domains", f"{words} by domain", caption, panels) if panels else None


def epsilon_positions(comparison: Comparison) -> dict[str, float]:
    """Place groups on a logarithmic axis of epsilon; those without privacy a step to the right of all others."""
    known = {group.name: group_epsilon(group) for group in comparison.groups}
    finite = [value for value in known.values() if math.isfinite(value) and value > 0]
    step = max(2.0, (max(finite) / min(finite)) ** 0.35) if finite else 2.0
    none = max(finite, default=1.0) * step
    return {name: value if math.isfinite(value) else none for name, value in known.items()}


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
        groups[0].caption,
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
        group.caption,
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
