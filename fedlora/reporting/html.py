"""The HTML page: one file that needs no network. Every number is marked with its group and quantity."""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from fedlora.communication.links import PROFILES
from fedlora.figures.chart import Chart, Panel, format_value
from fedlora.figures.style import DASHES, FILLS, class_colours, style_of
from fedlora.reporting.budgets import Answers, BudgetRow, TargetRow
from fedlora.reporting.changes import Change
from fedlora.reporting.comparison import NAMES, Comparison, Group, Mean, flatten, quantities, quantity_form, short_name
from fedlora.reporting.differences import Difference, to_best
from fedlora.reporting.plotly_charts import plot
from fedlora.reporting.runs import FinishedRun
from fedlora.reporting.study_results import StudyResults


@dataclass(frozen=True)
class Part:
    """What a page says of the runs of one task and data set.

    Attributes
    ----------
    name : str
        Of its section and its folder.
    title : str
    below : str
        The folder of its tables.
    comparison : Comparison
    charts : sequence of Chart
        The first is the main one.
    answers : Answers
        To budgets and targets.
    pairs : sequence of Difference
        Of groups that share seeds.
    changes : sequence of Change
        Of groups that were evaluated before training.
    """

    name: str
    title: str
    below: str
    comparison: Comparison
    charts: Sequence[Chart]
    answers: Answers
    pairs: Sequence[Difference] = ()
    changes: Sequence[Change] = ()

    def content(self, prefix: str) -> dict[str, Any]:
        """Return the variables of the template's section; ``prefix`` begins the ids of its elements."""
        comparison = self.comparison
        return {
            **vars(self),
            "prefix": prefix,
            "setting": _setting(comparison),
            "answer": answer(comparison),
            "fewest": fewest_bytes(comparison),
            "caveat": caveat(comparison, self.pairs),
            "columns": _columns(comparison),
            "front": {group.name for group in comparison.front},
            "beside": [key for key in comparison.varied if key not in ("method.name", "privacy")],
            "pairs": to_best(self.pairs),
            "audited": [run for run in comparison.runs if run.audit is not None],
        }


def page(parts: Sequence[Part], command: str, studies: Sequence[StudyResults] = ()) -> str:
    """Return the content of report.html.

    Parameters
    ----------
    parts : sequence of Part
        One section each.
    command : str
        The command that wrote the report.
    studies : sequence of StudyResults
        Studies among the folders, for their tuning and failed runs.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = files("fedlora.reporting") / "page"
    prefixes = {part.name: f"{part.name}-" if len(parts) > 1 else "" for part in parts}
    plots = {
        f"{prefixes[part.name]}{chart.name}-{i}": plot(panel)
        for part in parts
        for chart in part.charts
        for i, panel in enumerate(chart.panels)
    }
    methods = dict.fromkeys(method for part in parts for method in part.comparison.methods)
    variants = {variant["label"]: variant for part in parts for variant in _variants(part.comparison)}
    return environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8")).render(
        title=_title(parts, list(methods)),
        parts=[part.content(prefixes[part.name]) for part in parts],
        methods=[{"name": name, "style": style_of(name)} for name in methods],
        variants=list(variants.values()),
        cell=_cell,
        number=number,
        quantities=quantities,
        flatten=flatten,
        form=lambda comparison, quantity: quantity_form(comparison.task, quantity),
        shown=lambda value: "" if value is None else f"{value:g}" if isinstance(value, float) else str(value),
        class_colours=class_colours,
        height=_height,
        style_of=style_of,
        profiles=PROFILES,
        machines=_machines([run for part in parts for run in part.comparison.runs]),
        studies=studies,
        change_cells=_change_cells,
        difference_cell=_difference_cell,
        score_cell=_score_cell,
        cost_cell=_cost_cell,
        value=format_value,
        command=command,
        css=Markup((folder / "report.css").read_text(encoding="utf-8")),
        script=Markup((folder / "report.js").read_text(encoding="utf-8")),
        plotly=_plotly(),
        plots=_packed(json.dumps(plots, allow_nan=False, separators=(",", ":"))),
    )


@cache
def _plotly() -> dict[str, Any]:
    """Return plotly's script, of 4.8 MB."""
    return _packed(get_plotlyjs())


def _packed(text: str) -> dict[str, Any]:
    """Compress a text for the page's script: in base 85, with a comma for "<", which could end the element."""
    packed = gzip.compress(text.encode(), 9, mtime=0)
    return {"bytes": len(packed), "text": Markup(base64.b85encode(packed, pad=True).decode().replace("<", ","))}


def _height(panel: Panel) -> int | None:
    """Pixels of a panel whose rows need a line each; None for the style sheet's."""
    if panel.kind == "bars":
        return 80 + 20 * len(panel.series[0].x)
    return 60 + 30 * len(panel.series) if panel.kind == "table" else None


def number(of: str, quantity: str, value: float, form: str = "number") -> Markup:
    """Mark a number with its group (``data-of``) and quantity (``data-q``); ``value`` has all digits."""
    mark = Markup('<data value="{}" data-of="{}" data-q="{}" data-form="{}">{}</data>')
    return mark.format(repr(float(value)), of, quantity, form, format_value(value, form))


def mean_number(group: Group, quantity: str) -> Markup:
    """Return a group's mean with its interval."""
    mean, form = group.means[quantity], quantity_form(group.task, quantity)
    shown = number(group.name, f"{quantity}.mean", mean.mean, form)
    if mean.half is None:
        return shown
    return (
        shown
        + Markup(' <span class="half">± ')
        + number(group.name, f"{quantity}.half", mean.half, form)
        + Markup("</span>")
    )


def answer(comparison: Comparison) -> Markup:
    """Write the sentence that names the best configuration at each privacy level, and its bytes."""
    best: dict[str, list[Markup]] = {}
    for level in comparison.privacy_levels:
        first = comparison.ranked(level)[0]
        best.setdefault(first.label, []).append(
            Markup('<span class="nowrap">{} {}</span> ({}, {} sent)').format(
                mean_number(first, comparison.score), _at(level), *_seeds_and_bytes(first)
            )
        )
    better = "Highest" if comparison.task.maximize else "Lowest"
    clauses = [Markup("<strong>{}</strong> with {}").format(label, _listed(parts)) for label, parts in best.items()]
    return Markup("{} {}: {}.").format(better, comparison.score_title, Markup("; ").join(clauses))


def fewest_bytes(comparison: Comparison) -> Markup:
    """Write the sentence that names the configuration with the fewest bytes, unless it is also the best."""
    cheapest: dict[str, list[Markup]] = {}
    for level in comparison.privacy_levels:
        ranked = comparison.ranked(level)
        least = min(ranked, key=lambda group: group.means["total_bytes"].mean)
        if least is not ranked[0]:
            cheapest.setdefault(least.label, []).append(
                Markup('<span class="nowrap">{} {}</span> ({} sent)').format(
                    mean_number(least, comparison.score), _at(level), _seeds_and_bytes(least)[1]
                )
            )
    clauses = [Markup("<strong>{}</strong> with {}").format(name, _listed(parts)) for name, parts in cheapest.items()]
    return Markup("Fewest bytes: {}.").format(Markup("; ").join(clauses)) if clauses else Markup("")


def _seeds_and_bytes(group: Group) -> tuple[Markup, Markup]:
    count = len(group.runs)
    seeds = number(group.name, "n", count, "integer") + (" seed" if count == 1 else " seeds")
    return seeds, number(group.name, "total_bytes.mean", group.means["total_bytes"].mean, "bytes")


def _listed(parts: Sequence[Markup | str]) -> Markup:
    """Join with commas and a last and."""
    *most, last = parts
    return Markup(", ").join(most) + " and " + last if most else Markup("{}").format(last)


def caveat(comparison: Comparison, pairs: Sequence[Difference]) -> Markup:
    """Write the caveats: scores that do not compare, orders that are open, and the score of the largest class."""
    parts: list[Markup] = []
    if comparison.personalised:
        text = "Scores are personalised: each client's own model on its own test examples. "
        parts.append(Markup("{}They cannot be compared with a global model's scores.").format(text))
    single = [group for group in comparison.groups if len(group.runs) == 1]
    open_levels = []
    for level in comparison.privacy_levels:
        ranked = comparison.ranked(level)
        if len(ranked) > 1 and _is_open(ranked[0], ranked[1], comparison.score, pairs):
            open_levels.append(_at(level))
    if single:
        parts.append(Markup("One seed is not enough to rank: some configurations have no interval."))
    if open_levels:
        levels = str(_listed(open_levels))
        text = "{} these seeds do not separate the best two."
        parts.append(Markup(text).format(levels[0].upper() + levels[1:]))
    baseline = comparison.task.baseline
    if baseline is not None:
        name = baseline.metric
        known = [group for group in comparison.groups if name in group.means]
        if len({round(group.means[name].mean, 6) for group in known}) == 1:
            form = comparison.task.form(name)
            value = number(known[0].name, f"{name}.mean", known[0].means[name].mean, form)
            parts.append(Markup("{} gives {}.").format(baseline.sentence, value))
    return Markup(" ").join(parts)


def _is_open(best: Group, next_best: Group, score: str, pairs: Sequence[Difference]) -> bool:
    """Whether the interval of their difference holds 0; without common seeds, whether their intervals overlap."""
    for pair in pairs:
        if pair.first is best and pair.second is next_best:
            return pair.mean.half is not None and abs(pair.mean.mean) <= pair.mean.half
    a, b = best.means[score], next_best.means[score]
    return a.half is not None and b.half is not None and abs(a.mean - b.mean) <= a.half + b.half


def _at(level: str) -> str:
    return "without privacy" if level == "no privacy" else f"at {level}"


def _title(parts: Sequence[Part], methods: Sequence[str]) -> str:
    several = len(parts) > 1 or len(parts[0].comparison.groups) > 1
    ending = "" if not several else " compared" if len(parts) == 1 else " by task"
    return _names(methods).replace("-", "\N{NON-BREAKING HYPHEN}") + ending


def _names(methods: Sequence[str]) -> str:
    if len(methods) > 5:
        return f"{len(methods)} methods"
    *most, last = methods
    return f"{', '.join(most)} and {last}" if most else last


def _setting(comparison: Comparison) -> list[str]:
    """What all runs have in common, in a few words."""
    flat = [flatten(run.config) for run in comparison.runs]

    def common(key: str) -> Any:
        values = {str(row[key]) for row in flat}
        return flat[0][key] if len(values) == 1 else None

    names = [name and short_name(name) for name in map(common, NAMES)]
    words = [*names, common("data.partition.kind")]
    clients, rounds = {run.summary.clients for run in comparison.runs}, common("run.rounds")
    words += [f"{min(clients)} clients" if len(clients) == 1 else None, f"{rounds} rounds" if rounds else None]
    tested = sorted({run.summary.test_examples for run in comparison.runs if run.summary.test_examples is not None})
    if tested:
        most = "" if len(tested) == 1 else f" to {tested[-1]:,}"
        words.append(f"{tested[0]:,}{most} test examples")
    return [str(word) for word in words if word]


def _variants(comparison: Comparison) -> list[dict[str, Any]]:
    """Lines and markers of methods with several variants, for the legend."""
    seen: dict[str, dict[str, Any]] = {}
    for group in (group for facet in comparison.facets.values() for group in facet.groups):
        dash = {"solid": "", "dash": "6 4", "dot": "2 3", "dashdot": "6 3 2 3"}[DASHES[group.variant % 4][1]]
        fill = FILLS[group.variant % len(FILLS)][1]
        look = {"method": group.method, "colour": style_of(group.method).colour, "dash": dash, "fill": fill}
        seen.setdefault(group.caption, {"label": group.caption, **look})
    counts = Counter(entry["method"] for entry in seen.values())
    return list(seen.values()) if max(counts.values()) > 1 else []


def _columns(comparison: Comparison) -> list[tuple[str, str]]:
    """Quantities of the table of groups, with their titles."""
    wanted = [
        (comparison.score, f"{'own ' if comparison.personalised else ''}test {comparison.score_title}"),
        ("epsilon_max", "epsilon"),
        ("total_bytes", "sent"),
        ("uplink_bytes", "up"),
        ("downlink_bytes", "down"),
        ("initial_bytes", "once"),
        ("socket_bytes", "on sockets"),
        ("socket_overhead", "overhead"),
        ("trainable_parameters", "trained"),
        ("seconds_lte", "on LTE"),
        ("drift", "drift"),
    ]
    if comparison.task.better_high(comparison.task.client_metric):
        wanted.append(("client_min", "lowest client"))
    return [(name, title) for name, title in wanted if any(name in group.means for group in comparison.groups)]


def _cell(group: Group, quantity: str) -> Markup:
    if quantity not in group.means:
        return Markup("–")
    if quantity in (group.task.primary, "client_min"):
        return mean_number(group, quantity)
    return number(group.name, f"{quantity}.mean", group.means[quantity].mean, quantity_form(group.task, quantity))


def _score_cell(row: BudgetRow) -> Markup:
    """Show the score that a budget buys."""
    name = f"budget.{row.cost.name}.{row.budget:g}"
    return _mean_cell(row.group, name, row.score, row.group.task.form(row.group.task.primary))


def _difference_cell(row: Difference) -> Markup:
    """Show how much worse a group is than the best."""
    form = row.first.task.form(row.first.task.primary)
    return _mean_cell(row.second, f"minus.{row.first.name}", row.mean, form)


def _change_cells(row: Change) -> list[tuple[str, Markup]]:
    """Show a metric before and after training, and what it moved by."""
    means = {"before": row.before, "after": row.after, "change": row.change}
    return [(part, _mean_cell(row.group, f"{part}.{row.metric}", mean, row.form)) for part, mean in means.items()]


def _cost_cell(row: TargetRow) -> Markup:
    """Show what reaching a target cost."""
    return _mean_cell(row.group, f"target.{row.target:g}.{row.cost.name}", row.mean, row.cost.form)


def _mean_cell(group: Group, quantity: str, mean: Mean | None, form: str) -> Markup:
    if mean is None:
        return Markup("–")
    shown = number(group.name, f"{quantity}.mean", mean.mean, form)
    half = "" if mean.half is None else number(group.name, f"{quantity}.half", mean.half, form)
    return Markup('{} <span class="half">± {}</span>').format(shown, half) if half else shown


def _machines(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """Environments without their commands, each with its runs."""
    machines: dict[str, dict[str, Any]] = {}
    for run in runs:
        content = run.summary.environment.model_dump(exclude={"command"})
        machine = machines.setdefault(json.dumps(content, sort_keys=True), {**content, "runs": []})
        machine["runs"].append(run.name)
    return list(machines.values())
