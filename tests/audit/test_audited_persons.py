"""Persons as canaries, where ``privacy.unit`` is set: one of 500 examples counts as one unit, or is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.audit import audit, inputs
from fedlora.audit.report import Audit
from fedlora.config import load_config
from fedlora.data.partition import partition_rows
from fedlora.data.sources import UNIT_COLUMN, load_examples
from fedlora.training import cohort, dp
from fedlora.training.unit_sums import UnitBatch
from tests.audit.conftest import Configs
from tests.bare_runs import bare_runs
from tests.persons import SIZES, write_persons

Patch = pytest.MonkeyPatch
Content = Callable[..., dict[str, Any]]
ELS = {"user_mechanism": "els", "examples_per_unit": 4}


@pytest.fixture(scope="module")
def persons(configs: Configs, tmp_path_factory: pytest.TempPathFactory) -> Content:
    """Make configs of two clinics that protect an author, of whom one has 500 examples."""
    file = write_persons(tmp_path_factory.mktemp("persons") / "persons.jsonl")

    def content(**privacy: Any) -> dict[str, Any]:
        protected = {"unit": "author", "target_delta": 1e-3, **privacy}
        data = {"name": str(file), "partition": {"kind": "natural", "column": "clinic"}}
        client = {"batch_size": 5, "physical_batch_size": 64}
        return configs("example", privacy=protected, data=data, client=client)

    return content


def failed(found: Audit) -> set[str]:
    return {check.name for check in found.checks if not check.passed}


@pytest.mark.parametrize(("way", "share"), [({}, 0.4), ({"examples_per_unit": 8}, 0.4), (ELS, 0.25)])
def test_a_sound_client_keeps_what_it_claims_of_a_person(
    persons: Content, monkeypatch: Patch, way: dict[str, Any], share: float
) -> None:
    passes: list[int] = []
    batch = inputs.TokenTable._host_batch
    monkeypatch.setattr(
        inputs.TokenTable, "_host_batch", lambda self, rows: passes.append(len(rows)) or batch(self, rows)
    )
    found = audit(persons(**way), canaries=400, inputs=False)
    assert found.faults == []
    assert 7.5 < found.epsilon <= 8
    assert share * found.epsilon < found.lower_bound < found.epsilon
    assert found.unit == "one person (author) with all its examples at one client"
    # The person of 500 examples trains with all of them, or with as many as the plan lets it.
    if not way:
        assert sum(passes) > 400 * SIZES["zoe"] / 2


def clipped_by_example(patch: Patch) -> None:
    clip = dp.StackedDPOptimizer.clip_and_accumulate

    def rows(self: dp.StackedDPOptimizer) -> None:
        self.units = None
        clip(self)

    patch.setattr(dp.StackedDPOptimizer, "clip_and_accumulate", rows)


def split_over_units(patch: Patch) -> None:
    patch.setattr(cohort, "_units", lambda rows, table: np.asarray(rows) // 250)


def parts_clipped_by_physical_batch(patch: Patch) -> None:
    sums = UnitBatch.sums
    patch.setattr(UnitBatch, "sums", lambda self, sample, _: sums(self, sample, None))
    patch.setattr(UnitBatch, "known", lambda self, factors: factors)


@pytest.mark.parametrize("fault", [clipped_by_example, split_over_units, parts_clipped_by_physical_batch])
def test_a_person_that_counts_more_than_once_is_told(
    persons: Content, monkeypatch: Patch, fault: Callable[[Patch], None]
) -> None:
    fault(monkeypatch)
    found = audit(persons(), canaries=100, inputs=False)
    assert "sensitivity" in failed(found)
    assert found.lower_bound > found.epsilon


def test_noise_that_covers_one_example_of_a_person_is_told(persons: Content, monkeypatch: Patch) -> None:
    """With els it has to cover as many as a step may hold."""
    draw = dp.StackedDPOptimizer._draw_noise
    monkeypatch.setattr(dp.StackedDPOptimizer, "_draw_noise", lambda self, size: draw(self, size) / 4)
    found = audit(persons(**ELS), canaries=200, inputs=False)
    assert {"noise: head", "noise: lora_B"} <= failed(found)
    assert found.lower_bound > found.epsilon


def test_a_person_is_mislabelled_and_stays_away_as_a_whole(persons: Content, tmp_path: Path) -> None:
    config = load_config(persons())
    examples = load_examples(config)
    clients = partition_rows(config, examples.train, examples.label_names)
    whose = np.array(examples.train[UNIT_COLUMN][:])
    drawn = inputs._draw(config, clients, 1000, whose)
    assert 0 < drawn.held.sum() < len(drawn.held)
    clinic = np.zeros(len(whose), int)
    clinic[clients[1]] = 1
    for rows in drawn.rows:
        own = (whose == whose[rows[0]]) & (clinic == clinic[rows[0]])
        assert np.array_equal(np.sort(rows), np.flatnonzero(own))
    chosen = inputs._with_canaries(config, examples, clients, drawn, tmp_path)
    whole, train = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("all", "train")
    )
    assert len(whole) - len(train) == len(drawn.left_out)
    assert len({line["person"] for line in whole}) == len(np.unique(whose))
    assert (chosen.privacy.unit, chosen.privacy.user_mechanism) == ("person", "uls")


@pytest.mark.parametrize("way", [{}, ELS, {"mode": "none"}])
def test_the_final_model_is_attacked_by_persons(persons: Content, way: dict[str, Any]) -> None:
    content = persons(**way)
    if way.get("mode") == "none":
        del content["privacy"]["target_epsilon"]
    config = load_config(content)
    with bare_runs():
        evidence, count = inputs.attack_inputs(config, 1000, shadows=2)
    assert set(evidence) == {"loss, 10%", "loss, 50%", "membership, 10%", "membership, 50%"}
    assert (count > 50) == (way.get("mode") == "none")
