"""Group runs that differ only in their seed, find the config keys in which groups differ, and average their numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from fedlora.communication.links import PROFILES, link_seed, network_profile, round_network
from fedlora.config import Config, Section
from fedlora.errors import InputError
from fedlora.reporting.runs import FinishedRun, Found, Unfinished
from fedlora.tasks import Task

# Keys that do not change a run's result, up to rounding: where it ran, what was in memory at once, and its name.
_NOT_AXES = (
    "run.name",
    "run.seed",
    "simulation.",
    "tracking.",
    "network.",
    "server.timeout",
    "server.evaluate_clients",
    "server.evaluate_start",
    "client.physical_batch_size",
    "client.gradient_checkpointing",
    "client.group_by_length",
)
_PRIVACY = ("privacy.mode", "privacy.target_epsilon", "privacy.noise_multiplier")
_VARIANTS = 4
"""As many of a method have a line style of their own."""
_START = "start_"
"""Before the name of a metric: its value before the first round."""
PRIVACY = "privacy"
"""The axis that stands for the privacy mode and its target."""

NAMES = ("model.name", "data.name")
"""Keys whose values may be paths."""

Value = Any


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95 % interval.

    Attributes
    ----------
    mean : float
    half : float or None
        Half the width of the interval by Student's t distribution; None for a single value.
    n : int
    """

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float], rounding: float = 0.0) -> Mean:
        """Average one or more values, whose rounding adds a variance of its own."""
        n = len(values)
        mean = math.fsum(values) / n
        if n == 1:
            return cls(mean, None, 1)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) + rounding)
        return cls(mean, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n), n)

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half is None else self.mean + self.half


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone.

    Attributes
    ----------
    runs : list of FinishedRun
        In the order of their seeds.
    axes : dict of str to object
        Values of the axes.
    label : str
        Method and the axes' values, privacy apart.
    variant : int
        Index among those groups of the method that differ in more than privacy.
    caption : str
        The label in a figure, whose panel may say a part of it.
    """

    runs: list[FinishedRun]
    axes: dict[str, Value]
    label: str
    variant: int
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.caption:
            object.__setattr__(self, "caption", self.label)

    @property
    def method(self) -> str:
        """Method of all its runs."""
        return self.runs[0].config.method.name

    @property
    def task(self) -> Task:
        """Task of all its runs."""
        return self.runs[0].task

    @property
    def tested_on(self) -> tuple[str | None, ...]:
        """The examples that its runs are scored on. Scores on different ones do not compare."""
        data = self.runs[0].config.data
        return data.name, data.subset, data.test

    @property
    def privacy(self) -> str:
        """Privacy of all its runs: epsilon and a number, sigma and a number, or no privacy."""
        return privacy_label(self.runs[0].config)

    @property
    def name(self) -> str:
        """Label and privacy."""
        return f"{self.label} · {self.privacy}"

    @cached_property
    def means(self) -> dict[str, Mean]:
        """Mean of every quantity that all its runs have."""
        rows = [quantities(run) for run in self.runs]
        return {name: Mean.of([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}


@dataclass(frozen=True)
class Comparison:
    """The content of a report.

    Attributes
    ----------
    groups : list of Group
    unfinished : list of Unfinished
    duplicates : list of FinishedRun
        Runs left out because another run has the same config and seed.
    axes : list of str
        Config keys that tell groups apart; ``privacy`` stands for its mode and target.
    varied : list of str
        All config keys in which runs differ.
    front : list of Group
        Groups on the Pareto front of score, epsilon and bytes.
    """

    groups: list[Group]
    unfinished: list[Unfinished]
    duplicates: list[FinishedRun]
    axes: list[str]
    varied: list[str]

    @property
    def runs(self) -> list[FinishedRun]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs]

    @property
    def personalised(self) -> bool:
        """Whether scores are those of the clients' own models, each on its own test examples."""
        return self.runs[0].summary.personalised

    @property
    def score(self) -> str:
        """Return the metric that ranks groups."""
        return self.task.primary

    @property
    def score_title(self) -> str:
        """Return that metric in words."""
        return self.score.replace("_", " ")

    @property
    def task(self) -> Task:
        """The task of all runs."""
        return self.groups[0].task

    @property
    def methods(self) -> list[str]:
        """Methods in the order of the groups."""
        return list(dict.fromkeys(group.method for group in self.groups))

    @property
    def privacy_levels(self) -> list[str]:
        """Labels of privacy, from the strictest to none."""
        levels = {group.privacy: _strictness(group) for group in self.groups}
        return sorted(levels, key=lambda label: levels[label])

    @cached_property
    def front(self) -> list[Group]:
        """Groups that no other group dominates: at least as good in score, epsilon and bytes, and better in one."""
        converged = [group for group in self.groups if self.costs(group)[0] < math.inf]
        return [converged[i] for i in pareto([self.costs(group) for group in converged])]

    @cached_property
    def facets(self) -> dict[str, Comparison]:
        """The same groups, divided by one axis if there are too many of a method to be told apart; by its value."""
        counts = {method: len({g.variant for g in self.groups if g.method == method}) for method in self.methods}
        axes = [axis for axis in _beside(self.axes) if all(axis in group.axes for group in self.groups)]
        if max(counts.values()) <= _VARIANTS or not axes:
            return {"": self}
        found = [self._divided(axis) for axis in axes]
        return min(found, key=lambda parts: max(group.variant for part in parts.values() for group in part.groups))

    def _divided(self, axis: str) -> dict[str, Comparison]:
        by_value: dict[str, list[Group]] = defaultdict(list)
        rest = [other for other in _beside(self.axes) if other != axis]
        ordered = sorted(self.groups, key=lambda group: _order(group.axes, [axis]))
        for group in ordered:
            by_value[axis_label(axis, group.axes[axis])].append(group)
        parts = {}
        for title, groups in by_value.items():
            labels: dict[str, list[str]] = defaultdict(list)
            renamed = []
            for group in sorted(groups, key=lambda group: (group.method, _order(group.axes, rest))):
                caption = _label(group.method, group.axes, rest)
                known = labels[group.method]
                if caption not in known:
                    known.append(caption)
                renamed.append(replace(group, caption=caption, variant=known.index(caption)))
            order = {group.name: place for place, group in enumerate(self.groups)}
            renamed.sort(key=lambda group: order[group.name])
            parts[title] = replace(self, groups=renamed)
        return parts

    def ranked(self, level: str) -> list[Group]:
        """Return the groups of a level of privacy, the best score first; of equal scores, the fewest bytes."""
        groups = [group for group in self.groups if group.privacy == level]
        return sorted(groups, key=lambda group: (self.costs(group)[0], self.costs(group)[2]))

    def costs(self, group: Group) -> tuple[float, float, float]:
        """Return score (negated where higher is better), epsilon and bytes: lower is better.

        Epsilon is rounded to three digits, as tables show it: calibration leaves runs of one target at 7.998 and 7.999.
        """
        score = group.means[self.score].mean
        cost = -score if self.task.maximize else score
        if math.isnan(cost):  # a loss that diverged
            cost = math.inf
        return (cost, float(f"{group_epsilon(group):.3g}"), group.means["total_bytes"].mean)


def compare(found: Found) -> Comparison:
    """Sort runs into groups.

    Raises
    ------
    InputError
        If they are of different tasks, or some have a global model and some models of their clients' own.
    """
    tasks = {run.config.model.task: run for run in found.runs}
    if len(tasks) > 1:
        shown = " and ".join(f"{run.name} ({task})" for task, run in tasks.items())
        raise InputError("DIR", shown, "runs of different tasks cannot be compared; report on each task alone")
    if len({run.summary.personalised for run in found.runs}) > 1:
        shown = " and ".join(run.name for run in found.runs)
        remedy = "scores of clients' own models and of global models cannot be compared; report on each alone"
        raise InputError("DIR", shown, remedy)
    flat = {id(run): flatten(run.config) for run in found.runs}
    varied = _varied([flat[id(run)] for run in found.runs])
    axes = _independent([flat[id(run)] for run in found.runs], varied)
    by_axes: dict[tuple[Value, ...], dict[int, FinishedRun]] = defaultdict(dict)
    duplicates = []
    for run in found.runs:
        same = by_axes[tuple(_hashable(flat[id(run)].get(axis)) for axis in axes)]
        if run.config.run.seed in same:
            duplicates.append(run)
        else:
            same[run.config.run.seed] = run
    beside = _beside(axes)
    groups: list[Group] = []
    variants: dict[str, list[str]] = defaultdict(list)
    # Variants are numbered in the order of their values.
    for of_seed in sorted(by_axes.values(), key=lambda of: _order(flat[id(next(iter(of.values())))], beside)):
        runs = [run for _, run in sorted(of_seed.items())]
        own = flat[id(runs[0])]
        label = _label(runs[0].config.method.name, own, beside)
        known = variants[runs[0].config.method.name]
        if label not in known:
            known.append(label)
        groups.append(Group(runs, {axis: own[axis] for axis in axes if axis in own}, label, known.index(label)))
    groups.sort(key=lambda group: (group.method, group.variant, _strictness(group)))
    return Comparison(groups, found.unfinished, duplicates, axes, varied)


def quantities(run: FinishedRun) -> dict[str, float]:
    """Return every number of a run, by the name that tables and figures use.

    Returns
    -------
    dict of str to float
        Shares in [0, 1], bytes, seconds. Missing where the run has none, as epsilon without privacy. ``start_...`` is
        a metric before the first round. ``socket_bytes``
        is what Flower moved, and ``socket_overhead`` by what share that is more than the messages in it, of runs on
        real nodes (of one that was resumed, since then). ``drift`` is the mean over the rounds that have one;
        ``seconds_NAME`` is what all rounds' messages take on the links of a profile; ``client_...`` describes the
        spread over clients.
    """
    summary, sent = run.summary, run.summary.communication
    row: dict[str, float | None] = {
        **run.scores,
        **{f"{_START}{name}": value for name, value in run.start.items()},
        "epsilon_max": summary.epsilon.max if summary.epsilon else None,
        "epsilon_mean": summary.epsilon.mean if summary.epsilon else None,
        "total_bytes": sent.initial_bytes + sent.downlink_bytes + sent.uplink_bytes,
        "uplink_bytes": sent.uplink_bytes,
        "downlink_bytes": sent.downlink_bytes,
        "initial_bytes": sent.initial_bytes,
        "payload_bytes": sent.payload_bytes,
        "formula_bytes": sent.formula_bytes,
        "socket_bytes": sent.flower.sent_bytes + sent.flower.received_bytes if sent.flower else None,
        "socket_overhead": sent.flower.overhead if sent.flower else None,
        "trainable_parameters": summary.trainable_parameters,
        "drift": _mean_or_none(line.drift for line in run.rounds),
        "wall_seconds": summary.seconds.get("total"),
    }
    for name in network_names(run):
        row[f"seconds_{name}"] = math.fsum(network_seconds(run, name))
    values = client_scores(run)
    if values:
        row |= {
            "client_mean": float(np.mean(values)),
            "client_std": float(np.std(values)),
            "client_min": min(values),
            "client_max": max(values),
        }
    return {name: float(value) for name, value in row.items() if value is not None}


def client_scores(run: FinishedRun) -> list[float]:
    """Return the task's client metric of the final model on each client's own examples; empty if not measured."""
    return [getattr(line, run.task.client_metric) for line in run.clients]


def quantity_form(task: Task, quantity: str) -> str:
    """Return the format of a quantity: percent, bytes, seconds, integer or number."""
    if quantity == "socket_overhead":
        return "percent"
    if quantity.startswith(_START):
        return task.form(quantity.removeprefix(_START))
    if quantity.startswith("client_"):
        return task.form(task.client_metric)
    if quantity.endswith("_bytes"):
        return "bytes"
    if "seconds" in quantity:
        return "seconds"
    return "integer" if quantity == "trainable_parameters" else task.form(quantity)


def network_names(run: FinishedRun) -> list[str]:
    """Return the link profiles that a report covers: all built-in ones, and ``config`` if the run changed one."""
    section = run.config.network
    own = section.profile != "none" and network_profile(section) != PROFILES[section.profile]
    return [*PROFILES, *(["config"] if own else [])]


def network_seconds(run: FinishedRun, name: str) -> list[float]:
    """Simulated network seconds of each round under a link profile, with links drawn from the run's seed."""
    return list(network_by_round(run, name).values())


def network_by_round(run: FinishedRun, name: str) -> dict[int, float]:
    """Return the seconds of :func:`network_seconds` by round number."""
    profile = network_profile(run.config.network) if name == "config" else PROFILES[name]
    assert profile is not None
    by_round: dict[int, list[Any]] = defaultdict(list)
    for row in run.messages:
        by_round[row.round].append(row)
    seed = link_seed(run.config)
    return {number: round_network(rows, profile, seed)["seconds"] for number, rows in sorted(by_round.items())}


def group_epsilon(group: Group) -> float:
    """Mean of the largest epsilon of a client; infinite without privacy."""
    return group.means["epsilon_max"].mean if "epsilon_max" in group.means else math.inf


def privacy_label(config: Config) -> str:
    """Name a run's privacy."""
    privacy = config.privacy
    if privacy.mode == "none":
        return "no privacy"
    if privacy.target_epsilon is not None:
        return f"ε {privacy.target_epsilon:g}"
    return f"σ {privacy.noise_multiplier:g}"


def axis_label(axis: str, value: Value) -> str:
    """Return a short label of an axis value: rank 8, α 0.5, 10 clients."""
    if (axis, value) == ("privacy.mode", "none"):
        return "no privacy"
    if value is None:
        return f"{axis.rpartition('.')[2].replace('_', ' ')} default"
    if axis in ("method.name", "privacy.mode"):
        return str(value)
    if axis == "privacy.target_epsilon":
        return f"ε {value:g}" if isinstance(value, int | float) else f"ε {value}"
    if axis in NAMES:
        return str(in_a_cell(value))
    if axis == "data.partition.clients":
        return f"{value} clients"
    if axis == "data.partition.alpha":
        return f"α {value}"
    shown = f"{value:g}" if isinstance(value, float) else str(in_a_cell(value))
    return f"{axis.rpartition('.')[2].replace('_', ' ')} {shown}"


def short_name(name: str) -> str:
    """Return an asset's or a hub's name as it is, and a path's last part: paths differ on the reader's machine.

    A folder of the hub's cache, ``.../models--OWNER--NAME/snapshots/COMMIT``, is ``OWNER/NAME``.
    """
    if not name.startswith(("/", "~")):
        return name
    cached = next((part for part in Path(name).parts if part.startswith(("models--", "datasets--"))), "")
    return "/".join(cached.split("--")[1:]) or Path(name).name


def in_a_cell(value: Value) -> Value:
    """Return a config key's value as a table cell: lists and dicts become text, paths short."""
    if isinstance(value, str):
        return short_name(value)
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items())
    return " ".join(str(in_a_cell(item)) for item in value) if isinstance(value, list) else value


def flatten(config: Config) -> dict[str, Value]:
    """Return a config's values by ``section.key``, with ``privacy`` for its mode and target."""
    flat: dict[str, Value] = {}

    def visit(section: Section, prefix: str) -> None:
        for key in type(section).model_fields:
            value = getattr(section, key)
            if isinstance(value, Section):
                visit(value, f"{prefix}{key}.")
            else:
                # A table, such as ranks by client, is one value: its keys may differ between runs.
                flat[f"{prefix}{key}"] = value

    visit(config, "")
    return flat | {PRIVACY: privacy_label(config)}


def pareto(costs: Sequence[tuple[float, ...]]) -> list[int]:
    """Return the indices of the points that no other dominates (as low in all costs, and lower in one)."""

    def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [i for i, own in enumerate(costs) if not any(dominates(other, own) for other in costs)]


def _varied(flat: list[dict[str, Value]]) -> list[str]:
    # Only a method's own runs have its own keys, so that these keys are compared among them.
    keys = [
        key
        for key in dict.fromkeys(key for row in flat for key in row)
        if not key.startswith(_NOT_AXES) and key not in _PRIVACY
    ]
    # The most decisive keys come first; a tuned learning rate follows from the others.
    order = ["method.name", PRIVACY, *keys, "client.learning_rate"]
    keys = [key for key in dict.fromkeys(order) if key != "client.learning_rate"] + ["client.learning_rate"]
    return [key for key in keys if len({_hashable(row[key]) for row in flat if key in row}) > 1]


def _beside(axes: Sequence[str]) -> list[str]:
    """Return the axes beside method and privacy."""
    return [axis for axis in axes if axis not in ("method.name", PRIVACY)]


def _label(method: str, values: Mapping[str, Value], axes: Sequence[str]) -> str:
    """Name a group by its method and its values on some axes; only a method's own runs have its own keys."""
    return " · ".join([method, *(axis_label(axis, values[axis]) for axis in axes if axis in values)])


def _independent(flat: list[dict[str, Value]], varied: list[str]) -> list[str]:
    """Drop keys whose value follows from the other keys, such as a learning rate tuned for each method."""
    kept = list(varied)
    for key in reversed(varied):
        rest = [other for other in kept if other != key]
        values: dict[tuple[Value, ...], set[Value]] = defaultdict(set)
        for row in flat:
            values[tuple(_hashable(row.get(other)) for other in rest)].add(_hashable(row.get(key)))
        if key != "method.name" and rest and all(len(found) == 1 for found in values.values()):
            kept = rest
    return kept


def _hashable(value: Value) -> Value:
    if isinstance(value, dict):
        return tuple(sorted(value.items()))
    return tuple(value) if isinstance(value, list) else value


def _order(flat: Mapping[str, Value], axes: Sequence[str]) -> list[tuple[bool, float, str]]:
    """Sort key of axis values: numbers by size, then words."""
    values = [flat.get(axis) for axis in axes]
    return [(False, value, "") if isinstance(value, int | float) else (True, 0.0, str(value)) for value in values]


def _strictness(group: Group) -> tuple[float, str]:
    """Sort key of privacy levels: by target or measured epsilon, no privacy last."""
    target = group.runs[0].config.privacy.target_epsilon
    private = group.runs[0].config.privacy.mode != "none"
    return (target if private and target is not None else group_epsilon(group), group.privacy)


def _mean_or_none(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
