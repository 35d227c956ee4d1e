"""Numbers of the operating system's entropy: of the right distribution, never the same, and fast enough for a step."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest

from fedlora import entropy


@pytest.mark.parametrize("count", [0, 1, 2, 7, 2**20 + 3])
def test_normal_numbers_are_normal(count):
    """The bounds are passed by chance with probability below 1e-6 each."""
    block = torch.full((1, count), torch.nan)
    entropy.fill_normal(block)
    assert torch.isfinite(block).all()
    if count > 2**20:
        numbers = block[0].double().numpy()
        assert kstest(numbers, "norm").statistic < 2.8 / count**0.5
        # The sum of squares is chi-squared: the variance is right to less than 1 %.
        assert chi2.ppf(5e-7, count) < np.square(numbers).sum() < chi2.ppf(1 - 5e-7, count)
        # Neither neighbours, nor the two halves of a pair, nor two draws have to do with each other.
        other = entropy.normal(count)
        pairs = [(numbers[:-1], numbers[1:]), (numbers[: count // 2], numbers[count // 2 :][: count // 2])]
        for first, second in [*pairs, (numbers, other), (np.square(numbers), np.square(other))]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 5 / len(first) ** 0.5


def test_the_tails_reach_as_far_as_the_bits_do(monkeypatch):
    """All bits 0 are the largest number, and no bits give infinity."""
    monkeypatch.setattr(entropy.os, "urandom", bytes)
    assert 9.4 < entropy.normal(2)[0] < 9.6
    monkeypatch.setattr(entropy.os, "urandom", lambda count: b"\xff" * count)
    assert np.abs(entropy.normal(2)).max() < 1e-6
    assert entropy.uniform(1)[0] == 1 - 2.0**-53


def test_uniform_numbers_fill_the_unit_interval():
    numbers = entropy.uniform(200_000)
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    assert kstest(numbers, "uniform").statistic < 2.8 / len(numbers) ** 0.5
    block = torch.ones(3, 5, 7)[:, :2]  # not contiguous, as the part of a mask is
    entropy.fill_uniform(block)
    assert len(block.unique()) == block.numel()


def test_the_noise_of_300_000_numbers_takes_a_fraction_of_a_step():
    """About 0.01 s on an idle core; the least of several tries, for other work may run beside."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        entropy.fill_normal(torch.empty(300_000))
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5
