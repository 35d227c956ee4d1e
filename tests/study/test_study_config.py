"""Study files: what they may hold, and how mistakes in them are told."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedlora.config import load_config
from fedlora.errors import InputError
from fedlora.strategies.base import Contact, Sizes, get_strategy
from fedlora.study.config import load_study
from fedlora.study.plan import make_plan
from tests.configs import BASE
from tests.study.studies import planned

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "experiments/studies").glob("*.toml"))


@pytest.mark.parametrize(
    ("sections", "field", "said"),
    [
        ({"axis": {}}, "axis", "did you mean axes?"),
        ({"study": {"name": "a/b"}}, "study.name", "use letters"),
        ({"axes": {"run.seed": 1}}, "axes.run.seed", "list of values"),
        ({"axes": {"run.seed": []}}, "axes.run.seed", "list of values"),
        ({"axes": {"run.seed": [1, 2, 1]}}, "axes.run.seed", "twice"),
        ({"axes": {"ranks": [1, 2]}}, "axes.ranks", "section.key"),
        ({"axes": {"run.seed": [1], "more": [{"run.seed": 2}]}}, "axes.more", "axes.run.seed too"),
        ({"axes": {"run.seed": [1]}, "points": [{"run": {"seed": 2}}]}, "points", "axes.run.seed too"),
        ({"axes": {"method": [{"name": "fedit"}, {"name": "fed-sb"}]}}, "axes.method", "section.key"),
        ({"points": [{"rank": 2}]}, "points", "section.key"),
        ({"tuning": {"values": [1.0], "over": "learning_rate"}}, "tuning.over", "section.key"),
        ({"base": BASE | {"data": 1}, "tuning": {"values": [1.0]}}, "base.data", "[base.data]"),
        ({"base": BASE | {"run": "x"}}, "base.run", "[base.run]"),
        ({"axes": {"run.name": ["a", "b"]}}, "axes.run.name", "cannot be varied"),
        ({"axes": {"simulation.workers": [1, 2]}}, "axes.simulation.workers", "cannot be varied"),
        ({"draw": {"number": 0, "distributions": {}}}, "draw.number", "give an integer of at least 1"),
        ({"draw": {"number": 1, "distributions": {"method.rank": {"kind": "normal"}}}}, None, "uniform"),
        (
            {"draw": {"number": 1, "distributions": {"method.rank": {"kind": "integer", "low": 3, "high": 3}}}},
            "draw.distributions.method.rank.low",
            "low < high",
        ),
        (
            {"draw": {"number": 1, "distributions": {"method.rank": {"kind": "integer", "low": 2.1, "high": 2.9}}}},
            "draw.distributions.method.rank.low",
            "no whole number",
        ),
        (
            {"draw": {"number": 1, "distributions": {"method.alpha": {"kind": "log-uniform", "low": 0, "high": 3}}}},
            "draw.distributions.method.alpha.low",
            "above 0",
        ),
        (
            {"draw": {"number": 1, "distributions": {"method.alpha": {"kind": "choice"}}}},
            "draw.distributions.method.alpha.values",
            "required",
        ),
        ({"tuning": {}}, "tuning.values", "required"),
        ({"tuning": {"values": []}}, "tuning.values", "at least 1"),
        (
            {"tuning": {"values": [1.0]}, "axes": {"client.learning_rate": [1.0]}},
            "tuning.over",
            "varied by axes.client.learning_rate",
        ),
        ({"tuning": {"values": [1.0], "by": ["method.rank"]}, "axes": {"run.seed": [1]}}, "tuning.by", "not varied"),
        ({"tuning": {"values": {"fedit": []}}}, "tuning.values.fedit", "empty"),
        ({"tuning": {"values": {"fedit": [0.1, 0.2, 0.1]}}}, "tuning.values.fedit", "twice"),
        ({"tuning": {"values": [0.1, 0.1]}}, "tuning.values", "twice"),
        ({"tuning": {"values": [0.1], "seeds": [1, 1]}}, "tuning.seeds", "twice"),
        ({"budget": {"runs": 0}}, "budget.runs", "give an integer of at least 1"),
    ],
)
def test_a_mistake_is_told_by_its_field(sections: dict[str, Any], field: str | None, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_study(planned(**sections))
    assert said in str(caught.value)
    if field is not None:
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"axes": {"method.rnak": [1, 2]}}, "method.rnak"),
        ({"axes": {"method.rank": [1, 0]}}, "method.rank"),
        ({"axes": {"method.name": ["fedit", "fed-it"]}}, "method.name"),
        ({"points": [{"privacy": {"mode": "example"}}]}, "privacy.target_epsilon"),
        ({"tuning": {"values": [0.1, -0.1]}}, "client.learning_rate"),
        ({"tuning": {"values": {"fed-sb": [0.1]}}}, "tuning.values"),
    ],
)
def test_a_planned_run_that_cannot_be_is_told_by_its_key(sections: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        make_plan(load_study(planned(**sections)))
    assert caught.value.field == field


def test_a_study_needs_a_base() -> None:
    with pytest.raises(InputError, match="base = None: is required"):
        load_study({"axes": {"run.seed": [1]}})
    with pytest.raises(InputError, match=r"base.config = .*nowhere.toml"):
        load_study({"base": "nowhere.toml"})


def test_the_base_is_found_beside_the_study_and_changed_by_its_sections(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(tomli_w.dumps(BASE))
    path = tmp_path / "study.toml"
    path.write_text('[base]\nconfig = "base.toml"\n[base.data.partition]\nclients = 9\n')
    (run,) = make_plan(load_study(path)).runs
    assert run.config.data.partition.clients == 9
    assert run.config.method.name == BASE["method"]["name"]
    path.write_text('base = "base.toml"\n')
    assert make_plan(load_study(path)).runs[0].config.data.partition.clients == 4


def test_set_changes_the_base_and_the_studys_own_keys() -> None:
    study = load_study(
        planned(axes={"run.seed": [1, 2]}), {"model.name": "/models/x", "run.rounds": "7", "budget.runs": "3"}
    )
    assert {run.config.model.name for run in make_plan(study).runs} == {"/models/x"}
    assert {run.config.run.rounds for run in make_plan(study).runs} == {7}
    assert study.budget.runs == 3


@pytest.mark.parametrize("axes", [{"run.seed": [1, 2], "method.rank": [2]}, {"run": {"seed": [1, 2]}}])
def test_set_changes_an_axis(axes: dict[str, Any]) -> None:
    study = load_study(planned(axes=axes), {"axes.run.seed": "[3, 4, 5]"})
    assert [run.config.run.seed for run in make_plan(study).runs] == [3, 4, 5]
    assert next(iter(study.axes)) == "run.seed"


def test_set_of_a_varied_key_is_refused() -> None:
    with pytest.raises(InputError, match=r"--set = 'run.seed': is varied by axes.run.seed"):
        load_study(planned(axes={"run.seed": [1, 2]}), {"run.seed": "3"})


def test_axes_keep_their_order_and_values_when_written() -> None:
    """Long tables too, which writers of TOML put behind all else, and labels of any letters."""
    long = [{"label": f'{"x" * 60} "{n}" = {{é}}', "run.rounds": n, "client": {"learning_rate": 0.1}} for n in (1, 2)]
    axes = {"first": long, "run.seed": [0, 1], "method.rank": [2]}
    study = load_study(planned(axes=axes))
    again = load_study(tomllib.loads(study.to_toml()))
    assert list(again.axes) == list(axes)
    assert again == study


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_have_a_plan_and_survive_being_written(path: Path) -> None:
    study = load_study(path)
    plan = make_plan(study)
    assert len(plan.runs) > 1
    again = load_study(tomllib.loads(study.to_toml()))
    assert [(run.name, run.digest) for run in make_plan(again).runs] == [(run.name, run.digest) for run in plan.runs]


@pytest.mark.parametrize("name", ["privacy", "privacy_20newsgroups"])
def test_the_privacy_studys_ranks_match_in_parameters_and_in_bytes(name: str) -> None:
    """On MiniLM: query and value of six layers, 384 x 384, and a head of two (or twenty) classes."""
    study = load_study(ROOT / f"experiments/studies/{name}.toml")
    head = 385 * (2 if name == "privacy" else 20)
    trained, sent = [], []
    for table in study.axes["method"]:
        sizes = Sizes([(384, 384)] * 12, table["method.rank"], head)
        keys = {key: value for key, value in table.items() if key != "label"}
        method = get_strategy(table["method.name"])(load_config(study.base, keys))
        payload = method.payload(sizes, Contact(1, 0, None, {}))
        trained.append(payload.up)
        sent.append(payload.initial + study.base["run"]["rounds"] * (payload.down + payload.up))
    assert [table["method.name"] for table in study.axes["method"]] == 2 * ["fedit", "ffa-lora", "fed-sb"]
    assert max(trained[:3]) < 1.02 * min(trained[:3])
    assert max(sent[3:]) < 1.025 * min(sent[3:])
    assert {axis["privacy.target_epsilon"] for axis in study.axes["privacy"] if len(axis) > 2} == {1.0, 3.0, 8.0}
