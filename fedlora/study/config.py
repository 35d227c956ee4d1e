"""The typed model of a study file; every mistake becomes an InputError that names its key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, ValidationError

from fedlora.config import Config, Name, Positive, Section, Seed, input_error, override, read_toml
from fedlora.config.inline_toml import inline_toml, toml_key
from fedlora.errors import InputError
from fedlora.paths import find_path

Values = dict[str, Any]
"""``section.key`` to value; an empty string removes the key."""

LABEL = "label"
"""Key of a listed table that holds its part of the run names."""


class StudySection(Section):
    """``[study]``: the name of the study; its folder is runs/NAME."""

    name: Name = "study"


class DistributionSection(Section):
    """``[draw.distributions]``: the distribution of one key's values."""

    kind: Literal["uniform", "log-uniform", "integer", "choice"]
    low: float | None = None
    high: float | None = None
    values: Annotated[list[Any], Field(min_length=1)] | None = None


class DrawSection(Section):
    """``[draw]``: random points."""

    number: Positive
    seed: Seed = 0
    distributions: Annotated[dict[str, DistributionSection], Field(min_length=1)]


class TuningSection(Section):
    """``[tuning]``: picks the value of a key on validation data, for each group of runs, before they start.

    Attributes
    ----------
    over : str
        The key to tune.
    values : list, or dict of str to list
        Its candidates; or the candidates of each ``method.name``.
    by : list of str, optional
        Runs that agree in these keys share one choice, made on the first of them. By default: all keys that the study
        varies, except run.seed.
    seeds : list of int
        Each candidate runs with every one of these as ``run.seed``; the best by the mean is chosen.
    widen : int
        While the best of a group's candidates is its lowest or highest, a further candidate is tried beyond it, up to
        this many for each group. The optimum may lie outside the listed range.
    validation : float
        Share of the training examples to validate on, for a base config without ``data.validation``.
    """

    over: str = "client.learning_rate"
    values: Annotated[list[Any], Field(min_length=1)] | Annotated[dict[str, list[Any]], Field(min_length=1)]
    by: list[str] | None = None
    seeds: list[Seed] = Field(default=[0], min_length=1)
    widen: Annotated[int, Field(ge=0)] = 0
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1


class BudgetSection(Section):
    """``[budget]``: how many runs execute in parallel.

    Attributes
    ----------
    runs : int, optional
        Upper limit; by default as many as fit.
    memory_per_run : float
        Host memory of a run, in GiB.

    Notes
    -----
    A run takes ``simulation.cpus_per_worker`` cores and ``simulation.gpus_per_worker`` of a GPU and of its memory.
    """

    runs: Positive | None = None
    memory_per_run: Annotated[float, Field(gt=0)] = 3.0


class ReportSection(Section):
    """``[report]``: budgets and targets of the study's report. A change of it starts no run again.

    Attributes
    ----------
    budgets : dict of str to list of float
        Limits for which the report tells the best score, by cost: bytes, uplink_bytes, downlink_bytes, epsilon,
        seconds, rounds, or seconds_NAME of a link profile.
    targets : list of float
        Values of the task's primary metric for which the report tells what reaching them cost; shares as 0.8.
    """

    budgets: dict[str, Annotated[list[float], Field(min_length=1)]] = Field(default_factory=dict)
    targets: list[float] = Field(default_factory=list)


class StudyConfig(Section):
    """A study: a base config, what varies, how values are tuned, and how many runs execute in parallel.

    Attributes
    ----------
    base : dict
        Sections of the base config.
    axes : dict
        ``section.key`` to a list of its values, or any name to a list of tables of keys that vary together.
    points : list of dict
        Listed points, each crossed with the axes.
    draw : DrawSection, optional
        Random points, each crossed with the axes.
    """

    study: StudySection = StudySection()
    base: dict[str, Any]
    axes: dict[str, Any] = Field(default_factory=dict)
    points: list[dict[str, Any]] = Field(default_factory=list)
    draw: DrawSection | None = None
    tuning: TuningSection | None = None
    budget: BudgetSection = BudgetSection()
    report: ReportSection = ReportSection()

    def to_toml(self) -> str:
        """Return the study as TOML, with its base config in it; it runs again as it is."""
        content = _without_none(self.model_dump())
        axes = content.pop("axes")
        # Their order is that of the runs.
        lines = [f"{toml_key(name)} = {inline_toml(values)}\n" for name, values in axes.items()]
        return "".join([tomli_w.dumps(content), "\n[axes]\n", *lines])


def load_study(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> StudyConfig:
    """Read a study file.

    Parameters
    ----------
    source : str, Path or Mapping
        A TOML file, TOML text, or its parsed content. ``base`` is a table of sections, the path of a TOML file (from
        the study's folder, else the working directory), or a table with that path under ``config`` and sections that
        change it.
    overrides : Mapping, optional
        ``section.key`` to value, for the base config; keys of the study's own sections for these.

    Raises
    ------
    InputError
        If the file cannot be read, or a key or value is wrong.
    """
    content = read_toml(source, "STUDY")
    beside = Path(source).parent if isinstance(source, str | Path) and "\n" not in str(source) else Path()
    if "base" not in content:
        raise InputError("base", None, "is required; give the path of a config, or its sections as [base.SECTION]")
    content["base"] = _base(content["base"], beside)
    for key, value in (overrides or {}).items():
        section = key.split(".")[0]
        own = section in StudyConfig.model_fields and section not in Config.model_fields
        override(content if own else content["base"], key, value)
    if isinstance(content.get("axes"), dict):
        content["axes"] = flatten(content["axes"])
    if isinstance(content.get("points"), list):
        content["points"] = [flatten(p) if isinstance(p, dict) else p for p in content["points"]]
    draw = content.get("draw")
    if isinstance(draw, dict) and isinstance(draw.get("distributions"), dict):
        draw["distributions"] = flatten(draw["distributions"], leaf="kind")
    try:
        study = StudyConfig.model_validate(content)
    except ValidationError as error:
        raise input_error(error, StudyConfig, "STUDY") from None
    _check(study, set(overrides or {}))
    return study


def flatten(table: Mapping[str, Any], prefix: str = "", leaf: str | None = None) -> Values:
    """Flatten nested tables into dotted keys; a table that holds the key ``leaf`` is a value."""
    flat: Values = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and (leaf is None or leaf not in value):
            flat |= flatten(value, f"{prefix}{key}.", leaf)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _base(given: Any, beside: Path) -> dict[str, Any]:
    if isinstance(given, str):
        given = {"config": given}
    if not isinstance(given, dict):
        raise InputError("base", given, "give the path of a config, or its sections as [base.SECTION]")
    sections = dict(given)
    path = sections.pop("config", None)
    if path is None:
        return sections
    if not isinstance(path, str):
        raise InputError("base.config", path, "give the path of a TOML file")
    content = read_toml(find_path(str(beside / path), "base.config") or Path(path), "base.config")
    for key, value in flatten(sections).items():
        override(content, key, value)
    return content


def _check(study: StudyConfig, overrides: set[str]) -> None:
    for name, section in study.base.items():
        if not isinstance(section, dict):
            raise InputError(f"base.{name}", section, f"is a section; write [base.{name}] and its keys below")
    for name, values in study.axes.items():
        _check_axis(name, values)
    varied: dict[str, str] = {}
    for place, keys in _keys(study):
        for key in keys:
            if "." not in key:
                raise InputError(place, key, "is no key of a config; write section.key, for example run.seed")
            if key == "run.name" or key.startswith(("simulation.", "tracking.")):
                raise InputError(place, key, "cannot be varied: it says how runs are named, placed or logged")
            if varied.setdefault(key, place) != place:
                raise InputError(place, key, f"is varied by {varied[key]} too; vary it once")
            if key in overrides:
                raise InputError("--set", key, f"is varied by {place}; change the study file")
    if study.draw:
        for key, distribution in study.draw.distributions.items():
            _check_distribution(f"draw.distributions.{key}", distribution)
    if study.report != ReportSection():
        from fedlora.reporting.budgets import check_questions  # takes seconds

        check_questions(study.report.budgets, study.report.targets, "report")
    tuning = study.tuning
    if tuning is None:
        return
    if "." not in tuning.over:
        raise InputError("tuning.over", tuning.over, "is no key of a config; write section.key")
    if tuning.over in varied:
        raise InputError("tuning.over", tuning.over, f"is varied by {varied[tuning.over]}; tune it or vary it")
    for key in tuning.by or ():
        if key not in varied or key == "run.seed":
            remedy = f"is not varied by the study; choose among {', '.join(k for k in varied if k != 'run.seed')}"
            raise InputError("tuning.by", key, remedy)
    candidates = tuning.values if isinstance(tuning.values, dict) else {"": tuning.values}
    for method, values in candidates.items():
        place = f"tuning.values.{method}".rstrip(".")
        if not values:
            raise InputError(place, values, "is empty; list the candidates")
        _check_values(place, values)
        if tuning.widen and not can_widen(values):
            remedy = "cannot be widened; list at least two numbers above 0, or leave tuning.widen out"
            raise InputError(place, values, remedy)
    _check_values("tuning.seeds", tuning.seeds)


def can_widen(values: list[Any]) -> bool:
    """Whether a further candidate can be found beyond these: two numbers above 0 or more."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and len(values) > 1 and all(0 < value < math.inf for value in values)


def _check_values(place: str, values: list[Any]) -> None:
    if any(value in values[:i] for i, value in enumerate(values)):
        raise InputError(place, values, "holds a value twice; remove one")


def _check_axis(name: str, values: Any) -> None:
    place = f"axes.{name}"
    if not isinstance(values, list) or not values:
        raise InputError(place, values, "give a list of values, or of tables of keys that vary together")
    tables = [isinstance(value, dict) for value in values]
    if "." in name and not any(tables):
        _check_values(place, values)
        return
    if not all(tables):
        remedy = "is no section.key; write one, or a list of tables of keys that vary together"
        raise InputError(place, values, remedy)


def _keys(study: StudyConfig) -> list[tuple[str, set[str]]]:
    """Return every place in the file that varies something, with its keys."""
    found = []
    for name, values in study.axes.items():
        tables = [flatten(value) if isinstance(value, dict) else {name: value} for value in values]
        found.append((f"axes.{name}", {key for table in tables for key in table} - {LABEL}))
    for place, keys in (
        ("points", {key for point in study.points for key in point} - {LABEL}),
        ("draw", set(study.draw.distributions) if study.draw else set()),
    ):
        found.append((place, keys))
    return found


def _check_distribution(place: str, given: DistributionSection) -> None:
    if given.kind == "choice":
        if given.values is None:
            raise InputError(f"{place}.values", None, "is required with kind choice")
        return
    if given.low is None or given.high is None or not given.low < given.high:
        raise InputError(f"{place}.low", given.low, f"give low < high with kind {given.kind}")
    if given.kind == "integer" and math.ceil(given.low) > math.floor(given.high):
        raise InputError(f"{place}.low", given.low, f"no whole number lies between it and high = {given.high:g}")
    if given.kind == "log-uniform" and given.low <= 0:
        raise InputError(f"{place}.low", given.low, "must be above 0 with kind log-uniform")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
