"""Groups, axes, intervals and the Pareto front."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedlora.errors import InputError
from fedlora.reporting.comparison import Comparison, Mean, compare, pareto
from fedlora.reporting.runs import read_runs
from fedlora.reporting.tables import groups_table, runs_table, table_files
from tests.reporting.folders import make_run

values = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6)
costs = st.lists(st.tuples(*[st.integers(0, 3).map(float)] * 3), min_size=1, max_size=8)


@given(values)
def test_the_interval_is_that_of_students_t(sample: list[float]) -> None:
    found = Mean.of(sample)
    assert found.mean == pytest.approx(np.mean(sample), rel=1e-9, abs=1e-6)
    error = stats.sem(sample)
    assert found.half == pytest.approx(error * stats.t.ppf(0.975, len(sample) - 1), rel=1e-6, abs=1e-6)
    assert found.n == len(sample)


def test_one_value_has_no_interval() -> None:
    assert Mean.of([0.5]) == Mean(0.5, None, 1)


@given(costs)
def test_the_front_is_what_nobody_beats(points: list[tuple[float, ...]]) -> None:
    front = {points[i] for i in pareto(points)}
    for point in points:
        beaten = any(all(o <= p for o, p in zip(other, point, strict=True)) and other != point for other in points)
        assert (point in front) == (not beaten)


@pytest.fixture
def runs(tmp_path: Path) -> Callable[..., Comparison]:
    def make(*overrides: dict[str, Any]) -> Comparison:
        for number, each in enumerate(overrides):
            make_run(tmp_path / f"run{number}", number, each)
        return compare(read_runs([tmp_path]))

    return make


def test_runs_that_differ_in_their_seeds_are_one_group(runs: Callable[..., Comparison]) -> None:
    found = runs({"run.seed": 2}, {"run.seed": 0}, {"run.seed": 1, "simulation.workers": 3, "run.name": "other"})
    (group,) = found.groups
    assert [run.config.run.seed for run in group.runs] == [0, 1, 2]
    assert (found.axes, found.varied) == ([], [])


def test_what_a_run_chose_by_its_memory_is_no_axis(runs: Callable[..., Comparison]) -> None:
    found = runs(
        {"run.seed": 0, "client.physical_batch_size": 4, "client.gradient_checkpointing": True},
        {"run.seed": 1, "client.physical_batch_size": 8, "client.gradient_checkpointing": False},
        {"run.seed": 2, "client.group_by_length": True},
    )
    assert len(found.groups) == 1


def test_a_value_that_follows_from_others_is_no_axis(runs: Callable[..., Comparison]) -> None:
    tuned = {("fedit", 8): 0.1, ("fedit", 4): 0.2, ("fed-sb", 8): 0.3, ("fed-sb", 4): 0.3}
    found = runs(
        *(
            {"method.name": method, "method.rank": rank, "client.learning_rate": rate, "run.seed": seed}
            for (method, rank), rate in tuned.items()
            for seed in (0, 1)
        )
    )
    assert found.axes == ["method.name", "method.rank"]
    assert found.varied == ["method.name", "method.rank", "client.learning_rate"]
    assert [group.label for group in found.groups] == [
        *("fed-sb · rank 4", "fed-sb · rank 8", "fedit · rank 4", "fedit · rank 8")
    ]
    assert [group.variant for group in found.groups] == [0, 1, 0, 1]


def test_two_single_runs_are_compared_by_what_differs(runs: Callable[..., Comparison]) -> None:
    found = runs({"client.learning_rate": 0.1}, {"client.learning_rate": 0.2})
    assert found.axes == ["client.learning_rate"]
    assert [group.means["accuracy"].half for group in found.groups] == [None, None]
    assert [group.label for group in found.groups] == ["fed-sb · learning rate 0.1", "fed-sb · learning rate 0.2"]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("method.ranks", [{"a": 4, "b": 8}, {"a": 4, "b": 4, "c": 4}, None]),
        ("method.device_profile", [None, {"4": 0.5, "full": 0.5}, {"4": 1.0}]),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_table_of_values_is_one_value(key: str, values: list[Any], backwards: bool, tmp_path: Path) -> None:
    for number, value in enumerate(reversed(values) if backwards else values):
        overrides = {"model.task": "causal-lm", "method.name": "flexmore", key: value}
        make_run(tmp_path / f"run{number}", number, overrides, task="causal-lm")
    found = compare(read_runs([tmp_path]))
    assert found.axes == [key]
    assert (len(found.groups), len(found.duplicates)) == (len(values), 0)
    assert f"flexmore · {key.partition('.')[2].replace('_', ' ')} default" in [group.label for group in found.groups]
    written = runs_table(found)[key].dropna()
    assert sorted(written) == sorted(" ".join(f"{name}={item}" for name, item in v.items()) for v in values if v)


def test_a_column_of_words_and_numbers_is_one_of_words(runs: Callable[..., Comparison]) -> None:
    found = runs({"data.validation": 0.1}, {"data.validation": "held_out.csv"}, {})
    for table in (runs_table(found), groups_table(found)):
        files = table_files("table", table)
        read = pd.read_parquet(io.BytesIO(files["table.parquet"]))["data.validation"]
        assert sorted(read.dropna()) == ["0.1", "held_out.csv"]
        assert read.isna().sum() == 1


def test_privacy_goes_from_strict_to_none(runs: Callable[..., Comparison]) -> None:
    private = [{"privacy.mode": "example", "privacy.target_epsilon": e} for e in (10.0, 2.0, 0.5)]
    found = runs({"privacy.mode": "none"}, *private)
    assert found.privacy_levels == ["ε 0.5", "ε 2", "ε 10", "no privacy"]
    assert found.axes == ["privacy"]


def test_a_noise_multiplier_is_a_level_of_privacy(runs: Callable[..., Comparison]) -> None:
    noise = {"privacy.mode": "example", "privacy.noise_multiplier": 1.5}
    assert runs({"privacy.mode": "none"}, noise).privacy_levels == ["σ 1.5", "no privacy"]


def test_the_same_run_again_is_left_out(runs: Callable[..., Comparison]) -> None:
    found = runs({"run.seed": 1}, {"run.seed": 1})
    assert (len(found.runs), len(found.duplicates)) == (1, 1)


def test_a_run_that_diverged_is_behind_all_others(tmp_path: Path) -> None:
    for number, rate in enumerate((0.1, 0.2)):
        make_run(tmp_path / f"run{number}", number, {"client.learning_rate": rate}, task="causal-lm")
    summary = json.loads((tmp_path / "run0/summary.json").read_text())
    summary["final"] = {"loss": None, "perplexity": None}
    summary["communication"] |= {"initial_bytes": 1, "downlink_bytes": 1, "uplink_bytes": 1}
    (tmp_path / "run0/summary.json").write_text(json.dumps(summary))
    found = compare(read_runs([tmp_path]))
    assert [group.label for group in found.front] == ["fed-sb · learning rate 0.2"]
    assert sorted(found.groups, key=found.costs)[-1].label == "fed-sb · learning rate 0.1"


def test_different_tasks_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 0, {})
    make_run(tmp_path / "b", 1, {}, task="causal-lm")
    with pytest.raises(InputError, match=r"a \(sequence-classification\) and b \(causal-lm\).*different tasks"):
        compare(read_runs([tmp_path]))
    assert compare(read_runs([tmp_path / "b"])).score == "perplexity"
