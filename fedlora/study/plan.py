"""Expand a study file into runs: the grid, the listed and drawn points, and the groups that share a tuned value."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config import Config, load_config, read_toml
from fedlora.errors import InputError
from fedlora.strategies.server_app import resolve
from fedlora.study.config import LABEL, DistributionSection, StudyConfig, TuningSection, Values, flatten

_LONGEST_NAME = 120


@dataclass(frozen=True)
class PlannedRun:
    """One planned run.

    Attributes
    ----------
    name : str
        Name of the run and its folder; unique among the study's runs, or among its tuning runs.
    folder : str
        Relative to the study's folder: runs/NAME or tuning/NAME.
    values : dict
        Values that the study sets, by ``section.key``.
    config : Config
        Resolved.
    """

    name: str
    folder: str
    values: Values
    config: Config

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved config without the sections that do not change results."""
        return config_digest(self.config)


@dataclass(frozen=True)
class TuningGroup:
    """Runs that share a tuned value.

    Attributes
    ----------
    values : dict
        Values that they share, by the keys of ``tuning.by``.
    candidates : list of (object, PlannedRun)
        Each candidate value and a tuning run that tries it: one for each of the seeds.
    points : list of int
        Indices of its runs in the plan.
    private : bool
        Whether the runs are under DP. Tuning then spends privacy that their epsilon does not count.
    """

    values: Values
    candidates: list[tuple[Any, PlannedRun]]
    points: list[int]
    private: bool


@dataclass(frozen=True)
class Plan:
    """All runs of a study.

    Attributes
    ----------
    study : StudyConfig
    keys : list of str
        The keys that vary, in the order of the file.
    runs : list of PlannedRun
        With tuning, the tuned key has its first candidate until the choice is made.
    groups : list of TuningGroup
        Empty without tuning.
    """

    study: StudyConfig
    keys: list[str]
    runs: list[PlannedRun]
    groups: list[TuningGroup] = field(default_factory=list)

    def chosen(self, place: int, value: Any) -> PlannedRun:
        """Return a run with the tuned value that its group chose."""
        assert self.study.tuning is not None
        run = self.runs[place]
        return _run(self.study, run.values | {self.study.tuning.over: value}, run.name, "runs")

    def tuning_runs(self, group: TuningGroup, value: Any) -> list[tuple[Any, PlannedRun]]:
        """Return the runs that try a further candidate for a group.

        Raises
        ------
        InputError
            If no run can have the value.
        """
        assert self.study.tuning is not None
        taken = {run.name for other in self.groups for _, run in other.candidates}
        first = self.runs[group.points[0]]
        return _tuning_runs(self.study, self.study.tuning, first, group.values, value, taken)


def make_plan(study: StudyConfig) -> Plan:
    """Expand a study into its runs and check the config of each.

    Raises
    ------
    InputError
        If a run's config is wrong.
    """
    parts = _parts(study)
    points: list[tuple[str, Values]] = []
    for combination in itertools.product(*parts):
        values: Values = {}
        for _, table in combination:
            values |= table
        if all(values != other for _, other in points):
            points.append(("_".join(name for name, _ in combination if name), values))
    keys = list(dict.fromkeys(key for _, values in points for key in values))
    names = _unique(points)
    if study.tuning is None:
        return Plan(study, keys, [_run(study, v, n, "runs") for n, (_, v) in zip(names, points, strict=True)])
    tuning = study.tuning
    runs: list[PlannedRun] = []
    groups: dict[str, tuple[Values, list[int]]] = {}
    by = [key for key in keys if key != "run.seed"] if tuning.by is None else tuning.by
    for place, (name, (_, values)) in enumerate(zip(names, points, strict=True)):
        first = _candidates(study, tuning, values)[0]
        runs.append(_run(study, values | {tuning.over: first}, name, "runs", values))
        shared = {key: values[key] for key in by if key in values}
        groups.setdefault(json.dumps(shared, sort_keys=True, default=str), (shared, []))[1].append(place)
    taken: set[str] = set()
    return Plan(study, keys, runs, [_group(study, tuning, runs, *group, taken) for group in groups.values()])


def config_digest(config: Config) -> str:
    """SHA-256 of a resolved config without ``[simulation]`` and ``[tracking]``, which change no result."""
    content = config.model_dump(exclude={"simulation", "tracking"}, mode="json")
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def folder_digest(folder: Path) -> str | None:
    """Return the digest of the config in a run folder, or None if it has no readable config."""
    try:
        return config_digest(Config.model_validate(read_toml(folder / "config.toml")))
    except (OSError, ValueError):
        return None


def value_name(key: str, value: Any) -> str:
    """Return a value's part of a run name: text as it is, a number after the last part of its key."""
    if value in ("", None):
        return f"no-{_slug(key.rpartition('.')[2])}"
    if isinstance(value, str):
        return _slug(Path(value).name)
    shown = f"{value:g}" if isinstance(value, float) else json.dumps(value, default=str)
    return _slug(f"{key.rpartition('.')[2]}-{shown}".replace("_", "-"))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text.lower()).strip("-.") or "x"


def _parts(study: StudyConfig) -> list[list[tuple[str, Values]]]:
    """Return the dimensions to cross (listed points, drawn points, axes), each value with its part of the name."""
    listed = [_named(point) for point in study.points] + [_named(point) for point in _draw(study)]
    parts = [listed] if listed else []
    for name, values in study.axes.items():
        parts.append([_named(value if isinstance(value, dict) else {name: value}) for value in values])
    return parts


def _named(table: Mapping[str, Any]) -> tuple[str, Values]:
    values = flatten(table)
    label = values.pop(LABEL, None)
    return (_slug(str(label)) if label else "_".join(value_name(*item) for item in values.items())), values


def _draw(study: StudyConfig) -> Iterable[Values]:
    if study.draw is None:
        return
    rng = np.random.default_rng(study.draw.seed)
    for _ in range(study.draw.number):
        yield {key: _sample(rng, distribution) for key, distribution in study.draw.distributions.items()}


def _sample(rng: np.random.Generator, distribution: DistributionSection) -> Any:
    if distribution.kind == "choice":
        assert distribution.values is not None
        return distribution.values[int(rng.integers(len(distribution.values)))]
    low, high = distribution.low, distribution.high
    assert low is not None
    assert high is not None
    if distribution.kind == "integer":
        return int(rng.integers(int(np.ceil(low)), int(np.floor(high)) + 1))
    if distribution.kind == "uniform":
        return float(rng.uniform(low, high))
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _unique(points: list[tuple[str, Values]]) -> list[str]:
    """Return a unique name for every point, short enough for a file system."""
    names: list[str] = []
    for name, values in points:
        short = name or "run"
        digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]
        if len(short) > _LONGEST_NAME:
            short = f"{short[:_LONGEST_NAME]}-{digest}"
        names.append(f"{short}-{digest}" if short in names else short)
    return names


def _run(study: StudyConfig, values: Values, name: str, kind: str, shown: Values | None = None) -> PlannedRun:
    added: Values = {"run.name": name, "simulation.workers": 0, "simulation.address": None}
    if study.tuning is not None and "validation" not in study.base.get("data", {}):
        added["data.validation"] = study.tuning.validation
    config = resolve(load_config(study.base, {**added, **values}))
    return PlannedRun(name, f"{kind}/{name}", values if shown is None else shown, config)


def _group(
    study: StudyConfig,
    tuning: TuningSection,
    runs: list[PlannedRun],
    shared: Values,
    places: list[int],
    taken: set[str],
) -> TuningGroup:
    """Make a group's tuning runs, modelled on its first run; ``taken`` holds names already in use."""
    first = runs[places[0]]
    candidates = []
    for value in _candidates(study, tuning, first.values):
        candidates += _tuning_runs(study, tuning, first, shared, value, taken)
    private = any(runs[place].config.privacy.mode != "none" for place in places)
    return TuningGroup(shared, candidates, places, private)


def _tuning_runs(
    study: StudyConfig, tuning: TuningSection, first: PlannedRun, shared: Values, value: Any, taken: set[str]
) -> list[tuple[Any, PlannedRun]]:
    """Return a candidate's runs, one for each seed, and add their names to ``taken``."""
    name = "_".join(value_name(*item) for item in shared.items())
    found = []
    for seed in tuning.seeds:
        of_seed = f"_seed-{seed}" if len(tuning.seeds) > 1 else ""
        own = f"{name}_{value_name(tuning.over, value)}{of_seed}".strip("_")[-_LONGEST_NAME:].lstrip("_-.")
        own = next(n for n in itertools.chain([own], (f"{own}-{i}" for i in itertools.count(2))) if n not in taken)
        taken.add(own)
        # Only the last round counts, so the others need no evaluation.
        values = first.values | {
            "run.seed": seed,
            tuning.over: value,
            "server.evaluate_every": first.config.run.rounds,
        }
        found.append((value, _run(study, values, own, "tuning", {**shared, tuning.over: value})))
    return found


def _candidates(study: StudyConfig, tuning: TuningSection, values: Values) -> list[Any]:
    if isinstance(tuning.values, list):
        return tuning.values
    method = values.get("method.name", study.base.get("method", {}).get("name"))
    if method not in tuning.values:
        remedy = f"has no candidates for {method}; known: {', '.join(tuning.values)}"
        raise InputError("tuning.values", list(tuning.values), remedy)
    return tuning.values[method]
