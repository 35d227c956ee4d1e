"""A person with many examples is one unit: sampled as one, and clipped as one, however its rows are divided."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.data.tokens import TokenTable
from fedlora.errors import GuardError
from fedlora.privacy import PrivacyPlan
from fedlora.training import train_cohort
from fedlora.training.batches import unit_batches
from fedlora.training.cohort import _losses
from fedlora.training.unit_sums import UnitBatch
from tests import tiny

CLIP = 0.05
PERSONS = [0, 0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 0, 4, 4, 4, 4]
"""Whose each row is; person 0 has rows of both clients, and not in one piece."""
CLIENTS = [np.arange(11), np.arange(11, 16)]


def per_person(persons: int, rate: float = 1.0, sigma: float = 0.0, most: int | None = None) -> PrivacyPlan:
    plan = tiny.plan(sigma, CLIP, rate, rate * persons)
    return dataclasses.replace(plan, samples_units=True, examples_per_unit=most)


def setting(kind: str, **client: object) -> tuple[Config, AdaptedModel, Arrays, TokenTable]:
    config = tiny.settings(kind, client={"optimizer": "sgd", "local_steps": 1, **client})
    adapted = tiny.adapted_model(kind, config, torch.float64)
    table = tiny.table(kind, len(PERSONS))
    table.units = np.array(PERSONS)
    return config, adapted, adapted.arrays(tiny.trained_names(adapted, config)), table


def persons_sum(adapted: AdaptedModel, start: Arrays, table: TokenTable, rows: Sequence[int]) -> Arrays:
    """Loop over persons: the mean of the gradients of their rows, one by one, clipped; all of them added up."""
    adapted.set_clients([start])
    total = {name: torch.zeros_like(array) for name, array in start.items()}
    units = np.asarray(table.units)
    for person in np.unique(units[rows]):
        own = [row for row in rows if units[row] == person]
        gradients = [
            torch.autograd.grad(_losses(adapted, table, [np.array([row])], None).sum(), adapted.parameters())
            for row in own
        ]
        mean = [sum(parts) / len(own) for parts in zip(*gradients, strict=True)]
        norm = torch.stack([part.norm() for part in mean]).norm()
        for name, part in zip(adapted.trained, mean, strict=True):
            total[name] += part[0] * min(1.0, CLIP / (float(norm) + 1e-6))
    return total


@pytest.mark.parametrize("physical", [None, 1, 2, 3])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_sum_is_that_of_a_loop_over_persons(kind: str, physical: int | None) -> None:
    """In cohorts, and where physical batches divide a person's rows, over two or more of them."""
    config, adapted, start, table = setting(kind, physical_batch_size=physical)
    plans = [per_person(4), per_person(2)]
    jobs = tiny.jobs_of([start] * 2, CLIENTS, plans, learning_rate=1.0)
    results = train_cohort(adapted, table, jobs, config)
    assert [result.examples for result in results] == [4, 2]
    for rows, plan, result in zip(CLIENTS, plans, results, strict=True):
        expected = persons_sum(adapted, start, table, rows.tolist())
        for name, array in result.arrays.items():
            moved = (start[name] - array) * plan.expected_batch_size
            assert torch.allclose(moved, expected[name], atol=1e-9), name
        assert max(float(array.abs().max()) for array in expected.values()) > 1e-3


@pytest.mark.parametrize("person", [0, 1, 3])
def test_a_person_changes_the_sum_by_no_more_than_the_norm(person: int) -> None:
    """Far less than its examples could: the gradients are nearly all clipped."""
    config, adapted, start, table = setting("bert")
    rows = CLIENTS[0]
    without = rows[np.array(PERSONS)[rows] != person]

    def summed(rows: np.ndarray) -> torch.Tensor:
        job = tiny.jobs_of([start], [rows], [per_person(1)], learning_rate=1.0)
        result = train_cohort(adapted, table, job, config)[0]
        return torch.cat([(start[name] - array).flatten() for name, array in result.arrays.items()])

    change = float((summed(rows) - summed(without)).norm())
    assert 0.9 * CLIP < change <= CLIP * (1 + 1e-9)


def test_a_person_with_500_examples_counts_as_one() -> None:
    config, adapted, start, _ = setting("bert", physical_batch_size=64)
    table = tiny.table("bert", 504)
    table.units = np.array([0, 0, 1, *[2] * 500, 3])
    few = np.array([0, 1, 2, 503])
    sums = []
    for rows in (few, np.arange(504)):
        (result,) = train_cohort(
            adapted, table, tiny.jobs_of([start], [rows], [per_person(1)], learning_rate=1.0), config
        )
        sums.append(torch.cat([(start[name] - array).flatten() for name, array in result.arrays.items()]))
    assert 0.9 * CLIP < float((sums[1] - sums[0]).norm()) <= CLIP * (1 + 1e-9)


def test_a_clients_result_does_not_depend_on_the_pass() -> None:
    config, adapted, start, table = setting("bert", local_steps=3, physical_batch_size=2)
    plans = [per_person(4, 0.6, 0.8, 2), per_person(2, 0.6, 0.8, 2)]
    jobs = tiny.jobs_of([start] * 2, CLIENTS, plans, learning_rate=0.5)
    together = train_cohort(adapted, table, jobs, config)
    for job, result in zip(jobs, together, strict=True):
        alone = train_cohort(adapted, table, [job], config)[0]
        assert tiny.difference(alone.arrays, start) > 1e-3
        assert tiny.difference(alone.arrays, result.arrays) < 1e-10


def test_a_person_whose_gradient_overflowed_is_left_out() -> None:
    """Also where it overflowed in a physical batch before the last of its rows."""
    units = [np.array([0, 0, 0, 1])]
    sample = torch.ones(4, 3, dtype=torch.float64)
    sample[0, 1] = float("nan")
    _, carried = UnitBatch(units, 0, 2).sums(sample[:2], None)
    assert not torch.isfinite(carried).all()
    then, _ = UnitBatch(units, 2, 2).sums(sample[2:], carried)
    assert not torch.isfinite(then[0]).all()
    assert torch.equal(then[1], sample[3])
    assert torch.equal(UnitBatch(units, 0, 2).known(torch.ones(1)), torch.zeros(1))


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=8).map(sorted), min_size=1, max_size=3).filter(any),
    st.integers(1, 9),
)
def test_units_are_whole_whatever_the_physical_batches(rows: list[list[int]], size: int) -> None:
    units = [np.array(own, np.int64) for own in rows]
    values = [torch.rand(len(own), 2, dtype=torch.float64) for own in rows]
    carried, found = None, [torch.zeros(2, dtype=torch.float64) for _ in rows]
    for start in range(0, max(map(len, rows)), size):
        batch = UnitBatch(units, start, size)
        sums, carried = batch.sums(torch.cat([own[start : start + size] for own in values]), carried)
        whole = batch.known(torch.ones(len(sums), dtype=torch.float64))
        # Squares tell a unit that is counted whole from its parts.
        for client, part in enumerate((sums**2 * whole[:, None]).split(list(batch.clients.counts))):
            found[client] += part.sum(0)
    for own, numbers, got in zip(units, values, found, strict=True):
        means = [numbers[own == unit].mean(0) for unit in np.unique(own)]
        assert torch.allclose(got, sum((mean**2 for mean in means), torch.zeros(2, dtype=torch.float64)))


def test_units_are_drawn_as_a_whole_with_the_sample_rate() -> None:
    units = np.repeat(np.arange(50), np.arange(1, 51))
    rows = np.random.default_rng(0).permutation(len(units)) + 1000
    of = dict(zip(rows.tolist(), units.tolist(), strict=True))
    for generator in (torch.Generator().manual_seed(0), None):
        drawn = []
        for batch in unit_batches(rows, units, 0.3, 200, generator, most=7):
            persons = np.array([of[row] for row in batch.tolist()], np.int64)
            starts = np.flatnonzero(np.diff(persons, prepend=-1))
            assert len(starts) == len(np.unique(persons))  # rows of a person follow each other
            sizes = np.diff([*starts, len(persons)])
            assert (sizes == np.minimum(7, persons[starts] + 1)).all()
            assert len(np.unique(batch)) == len(batch)
            drawn.append(len(starts))
        # 5 standard deviations of the mean of 200 draws.
        assert abs(np.mean(drawn) - 15) < 5 * np.sqrt(50 * 0.3 * 0.7 / 200)


def test_examples_of_nobody_are_refused() -> None:
    config, adapted, start, table = setting("bert")
    table.units = None
    with pytest.raises(GuardError, match="whose they are"):
        train_cohort(adapted, table, tiny.jobs_of([start], [CLIENTS[0]], [per_person(4)]), config)
