"""Which examples enter a step: epochs without privacy, Poisson sampling with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

from fedlora.privacy.calibration import local_steps
from fedlora.training import batches
from fedlora.training.batches import poisson_batches, shuffled_batches
from tests import tiny


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3))
def test_epochs_hold_every_row_once(examples, batch_size, epochs):
    rows = np.arange(100, 100 + examples)
    config = tiny.settings(client={"batch_size": batch_size, "local_epochs": epochs})
    steps = local_steps(config, examples)
    drawn = list(shuffled_batches(rows, batch_size, steps, generator()))
    assert len(drawn) == steps == epochs * -(-examples // batch_size)
    assert sorted(np.concatenate(drawn)) == sorted(np.tile(rows, epochs))
    assert all(1 <= len(batch) <= batch_size for batch in drawn)
    for epoch in range(epochs):
        one = np.concatenate(drawn[epoch * steps // epochs : (epoch + 1) * steps // epochs])
        assert sorted(one) == sorted(rows)


def test_epochs_are_shuffled_anew():
    drawn = list(shuffled_batches(np.arange(50), 50, 3, generator()))
    assert len({tuple(batch) for batch in drawn}) == 3
    again = list(shuffled_batches(np.arange(50), 50, 3, generator()))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))


@pytest.mark.parametrize("draws", [2**20, 100, 1])
def test_poisson_batches_are_those_of_opacus(draws, monkeypatch):
    """However many steps are drawn at once."""
    monkeypatch.setattr(batches, "DRAWS", draws)
    rows = np.arange(7, 47)
    stock = UniformWithReplacementSampler(num_samples=40, sample_rate=0.2, generator=generator(3), steps=30)
    drawn = list(poisson_batches(rows, 0.2, 30, generator(3)))
    assert [list(batch - 7) for batch in drawn] == list(stock)
    assert len({len(batch) for batch in drawn}) > 3


def test_poisson_batches_hold_each_row_at_the_rate():
    counts = np.zeros(50)
    sizes = []
    for batch in poisson_batches(np.arange(50), 0.1, 4000, generator()):
        counts[batch] += 1
        sizes.append(len(batch))
    assert counts / 4000 == pytest.approx(np.full(50, 0.1), abs=0.025)
    assert np.mean(sizes) == pytest.approx(5, rel=0.03)
    # Rows enter on their own: the sizes are binomial, and some batches are empty.
    assert np.var(sizes) == pytest.approx(50 * 0.1 * 0.9, rel=0.1)
    assert min(sizes) == 0
    assert [len(b) for b in poisson_batches(np.arange(9), 1.0, 4, generator())] == [9] * 4


@given(st.integers(1, 200), st.integers(1, 64))
def test_local_steps(examples, batch_size):
    def steps(**client) -> int:
        return local_steps(tiny.settings(client={"batch_size": batch_size, **client}), examples)

    assert steps(local_steps=7) == 7
    assert steps() == steps(local_epochs=1) == max(1, -(-examples // batch_size))
    assert steps(local_epochs=3) == 3 * steps()


def test_poisson_batches_of_entropy_hold_each_row_at_the_rate():
    """Each count is off by 5 of its standard deviations with probability below 1e-6."""
    counts = np.zeros(50)
    sizes = []
    for batch in poisson_batches(np.arange(50), 0.1, 4000, None):
        counts[batch] += 1
        sizes.append(len(batch))
    assert len(sizes) == 4000
    assert np.abs(counts - 400).max() < 5 * (4000 * 0.1 * 0.9) ** 0.5
    assert np.var(sizes) == pytest.approx(50 * 0.1 * 0.9, rel=0.12)
    assert [len(b) for b in poisson_batches(np.arange(9), 1.0, 4, None)] == [9] * 4
    first, second = ([tuple(b) for b in poisson_batches(np.arange(50), 0.5, 3, None)] for _ in range(2))
    assert first != second
