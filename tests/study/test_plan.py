"""The plan's arithmetic: how many runs, of which values, under which names, in which groups."""

from __future__ import annotations

import itertools
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedlora.study.config import Values, load_study
from fedlora.study.plan import Plan, make_plan
from tests.study.studies import planned

KEYS: dict[str, st.SearchStrategy[Any]] = {
    "run.seed": st.integers(0, 9),
    "run.rounds": st.integers(1, 9),
    "method.rank": st.integers(1, 64),
    "method.name": st.sampled_from(["fedit", "ffa-lora", "fed-sb"]),
    "data.partition.alpha": st.floats(1e-3, 1e3),
    "client.batch_size": st.integers(1, 64),
}


@st.composite
def grids(draw: st.DrawFn) -> dict[str, list[Any]]:
    """Up to three axes of up to three values."""
    keys = draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=3, unique=True))
    return {key: draw(st.lists(KEYS[key], min_size=1, max_size=3, unique=True)) for key in keys}


def plan(**sections: Any) -> Plan:
    return make_plan(load_study(planned(**sections)))


def read(run: Any, key: str) -> Any:
    value: Any = run.config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@given(grids())
def test_a_grid_holds_every_combination_once(axes: dict[str, list[Any]]) -> None:
    runs = plan(axes=axes).runs
    expected = list(itertools.product(*axes.values()))
    assert [tuple(run.values[key] for key in axes) for run in runs] == expected
    assert [tuple(read(run, key) for key in axes) for run in runs] == expected


@given(grids())
def test_names_are_unlike_and_fit_a_folder(axes: dict[str, list[Any]]) -> None:
    runs = plan(axes=axes).runs
    assert len({run.name for run in runs}) == len(runs)
    assert len({run.digest for run in runs}) == len(runs)
    for run in runs:
        assert run.folder == f"runs/{run.config.run.name}"
        assert len(run.name) < 150


@given(grids(), st.data())
def test_listed_points_and_axes_are_crossed(axes: dict[str, list[Any]], data: st.DataObject) -> None:
    free = sorted(set(KEYS) - set(axes))
    tables = st.lists(st.fixed_dictionaries({free[0]: KEYS[free[0]]}), min_size=1, max_size=3, unique_by=str)
    points = data.draw(tables)
    runs = plan(axes=axes, points=points).runs
    assert len(runs) == len(points) * math.prod(map(len, axes.values()))
    assert {run.values[free[0]] for run in runs} == {point[free[0]] for point in points}


def test_keys_of_one_axis_vary_together() -> None:
    pairs = [{"method.name": "fedit", "method.rank": 4}, {"method": {"name": "fed-sb", "rank": 55}, "label": "SB 55"}]
    runs = plan(axes={"method": pairs, "run": {"seed": [0, 1]}}).runs
    assert [(r.values["method.name"], r.values["method.rank"], r.values["run.seed"]) for r in runs] == [
        ("fedit", 4, 0),
        ("fedit", 4, 1),
        ("fed-sb", 55, 0),
        ("fed-sb", 55, 1),
    ]
    assert [run.name for run in runs] == ["fedit_rank-4_seed-0", "fedit_rank-4_seed-1", "sb-55_seed-0", "sb-55_seed-1"]


def test_an_empty_value_removes_a_key_and_a_point_that_is_there_twice_runs_once() -> None:
    runs = plan(axes={"data.text": ["review", ""]}, points=[{"method.rank": 2}, {"method.rank": 2}]).runs
    assert [run.config.data.text for run in runs] == ["review", "text"]


def distributions() -> dict[str, Any]:
    return {
        "method.rank": {"kind": "integer", "low": 2, "high": 4},
        "client.learning_rate": {"kind": "log-uniform", "low": 1e-3, "high": 1e-1},
        "data.partition.alpha": {"kind": "uniform", "low": 0.5, "high": 1.5},
        "method.name": {"kind": "choice", "values": ["fedit", "fed-sb"]},
    }


@given(st.integers(0, 2**31), st.integers(1, 8))
def test_draws_stay_in_their_bounds_and_follow_the_seed(seed: int, number: int) -> None:
    draw = {"number": number, "seed": seed, "distributions": distributions()}
    first, again = plan(draw=draw).runs, plan(draw=draw).runs
    assert [run.values for run in first] == [run.values for run in again]
    assert len(first) == number
    for run in first:
        assert run.values["method.rank"] in (2, 3, 4)
        assert 1e-3 <= run.values["client.learning_rate"] <= 1e-1
        assert 0.5 <= run.values["data.partition.alpha"] <= 1.5
    # More draws begin with the same ones.
    more = plan(draw={**draw, "number": number + 1}).runs
    assert [run.values for run in more[:number]] == [run.values for run in first]


def test_log_uniform_draws_spread_over_the_decades() -> None:
    wide = {"client.learning_rate": {"kind": "log-uniform", "low": 1e-6, "high": 1.0}}
    runs = plan(draw={"number": 200, "distributions": wide}).runs
    below = sum(run.values["client.learning_rate"] < 1e-3 for run in runs)
    assert 70 < below < 130  # a uniform draw has none there


@given(grids(), st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=3, unique=True))
def test_groups_share_all_but_the_seed(axes: dict[str, list[Any]], values: list[float]) -> None:
    planned_ = plan(axes=axes, tuning={"values": values, "seeds": [77, 78]})
    assert sorted(place for group in planned_.groups for place in group.points) == list(range(len(planned_.runs)))
    assert len(planned_.groups) == math.prod(len(v) for key, v in axes.items() if key != "run.seed")
    names = [run.name for group in planned_.groups for _, run in group.candidates]
    assert len(set(names)) == len(names) == 2 * len(values) * len(planned_.groups)
    for group in planned_.groups:
        for place in group.points:
            assert {key: planned_.runs[place].values[key] for key in group.values} == group.values
        tried = [(value, run.config.run.seed) for value, run in group.candidates]
        assert tried == [(value, seed) for value in values for seed in (77, 78)]
        for value, run in group.candidates:
            assert run.config.client.learning_rate == value
            assert {key: read(run, key) for key in group.values} == group.values
            assert run.config.data.validation == 0.1


def test_a_group_by_fewer_keys_is_tuned_on_its_first_run() -> None:
    axes = {"method.name": ["fedit", "fed-sb"], "method.rank": [2, 4], "run.seed": [0]}
    planned_ = plan(axes=axes, tuning={"values": {"fedit": [0.1], "fed-sb": [0.2, 0.3]}, "by": ["method.name"]})
    assert [group.points for group in planned_.groups] == [[0, 1], [2, 3]]
    assert [[value for value, _ in group.candidates] for group in planned_.groups] == [[0.1], [0.2, 0.3]]
    assert {run.config.method.rank for group in planned_.groups for _, run in group.candidates} == {2}


def test_a_group_with_private_runs_is_private_though_it_is_tuned_without() -> None:
    modes = [{"privacy.mode": "none"}, {"privacy.mode": "example", "privacy.target_epsilon": 3.0}]
    shared, apart = (
        plan(axes={"method.rank": [2], "privacy": modes}, tuning={"values": [0.1], **by})
        for by in ({"by": ["method.rank"]}, {})
    )
    assert [group.private for group in shared.groups] == [True]
    assert [group.private for group in apart.groups] == [False, True]


def test_a_tuned_run_has_the_chosen_value_and_the_validation_split_of_its_tuning_runs() -> None:
    planned_ = plan(axes={"run.seed": [0, 1]}, tuning={"values": [0.1, 0.2]})
    run = planned_.chosen(1, 0.2)
    assert run.config.client.learning_rate == run.values["client.learning_rate"] == 0.2
    assert (run.folder, run.config.run.seed) == (planned_.runs[1].folder, 1)
    assert run.config.data == planned_.groups[0].candidates[0][1].config.data


def test_only_what_decides_the_result_is_in_the_digest() -> None:
    def digest(overrides: Values) -> str:
        return make_plan(load_study(planned(), overrides)).runs[0].digest

    same = digest({})
    assert digest({"simulation.cpus_per_worker": 2, "tracking.tensorboard": True}) == same
    assert digest({"method.rank": 9}) != same
    assert digest({"client.batch_size": 9}) != same
