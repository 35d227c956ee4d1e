"""Whole runs that protect persons: what they claim is recomputed, and goes on as it was after a stop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.cli.study import show_dry_run
from fedlora.config import load_config
from fedlora.data.tokens import prepare_data
from fedlora.results.privacy_spent import AGREES, explain_privacy
from fedlora.study.config import load_study
from fedlora.study.plan import make_plan
from tests.persons import SIZES, write_persons
from tests.small_runs import World, world

WAYS: dict[str, dict[str, Any]] = {
    "uls": {"unit": "author"},
    "some": {"unit": "author", "examples_per_unit": 8},
    "els": {"unit": "author", "user_mechanism": "els", "examples_per_unit": 4},
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("persons")
    with world(folder) as made:
        write_persons(folder / "persons.jsonl")
        yield made


def content(here: World, way: str, accountant: str = "rdp", **privacy: Any) -> dict[str, Any]:
    private = {"mode": "example", "target_epsilon": 6.0, "target_delta": 1e-3, "accountant": accountant}
    return here.content(
        "fedit",
        "bert",
        data={"name": str(here.folder / "persons.jsonl"), "partition": {"kind": "natural", "column": "clinic"}},
        client={"batch_size": 6, "physical_batch_size": 40},
        privacy={**private, **WAYS[way], **privacy},
    )


@pytest.mark.parametrize(("way", "accountant"), [("uls", "rdp"), ("some", "prv"), ("els", "prv"), ("els", "rdp")])
def test_the_claimed_epsilon_of_a_person_comes_out_again(here: World, way: str, accountant: str) -> None:
    """One person has 500 examples."""
    run = here.run(content(here, way, accountant))
    summary = run.summary["epsilon"]
    assert summary["unit"] == "one person (author) with all its examples at one client"
    data = prepare_data(load_config(content(here, way)))
    assert data.train.units is not None
    assert np.bincount(data.train.units).max() == SIZES["zoe"]
    for row in run.rows("privacy.csv"):
        drawn = data.drawn_from(int(row["client"]), run.config.privacy)
        assert row["sample_rate"] == pytest.approx(6 / drawn)
        assert (drawn < 41) == (way != "els")
    spent = explain_privacy(run.folder)
    assert spent.unit == summary["unit"]
    assert spent.recorded == summary["max"] <= 6.0
    assert spent.epsilon == pytest.approx(spent.recorded, rel=1e-9)
    groups = {step.get("examples_per_unit", 1) for step in spent.to_dict()["history"]}
    assert groups == {4 if way == "els" else 1}
    if (way, accountant) == ("els", "rdp"):
        # dp-accounting has no Renyi divergences of groups, and its other accountant is tighter.
        assert spent.compared == "pld"
        assert spent.difference < 0
        assert "upper bound" in spent.explanation
    else:
        assert abs(spent.difference) <= AGREES
        assert spent.explanation == ""
    assert any("other clients" in text for text in spent.not_covered)


@pytest.mark.parametrize("way", ["some", "els"])
def test_a_run_that_was_stopped_goes_on_as_it_was(here: World, way: str) -> None:
    whole, resumed = here.run(content(here, way)), here.run(content(here, way), stops=[1])
    assert resumed.seen() == whole.seen()
    assert resumed.rows("privacy.csv") == whole.rows("privacy.csv")


def test_the_plan_of_a_study_says_which_way_needs_less_noise(here: World, tmp_path: Path, capsys: Any) -> None:
    from rich.console import Console

    base = content(here, "some")
    base["run"]["name"] = "persons"
    plan = make_plan(load_study({"study": {"name": "ways"}, "base": base, "axes": {"privacy.target_epsilon": [2.0]}}))
    show_dry_run(Console(), plan, tmp_path / "study")
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if "mean gradient" in line)
    assert ": noise on a step's mean gradient, in clipping norms: uls has " in line
    assert line.endswith("needs less")
