"""The distributed discrete Gaussian mechanism: its numbers, its bounds, and divergences that were computed outright."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from fedlora import entropy
from fedlora.errors import InputError
from fedlora.privacy.discrete_gaussian import TAIL, NoisySum, discrete_gaussian, rounded_norm, tau


def probabilities(stddev: float, reach: int) -> np.ndarray:
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * stddev**2))
    found: np.ndarray = weights / weights.sum()
    return found


@pytest.mark.parametrize("stddev", [0.4, 1.0, 3.7])
@pytest.mark.parametrize("source", ["seeded", "entropy"])
def test_noise_has_the_probabilities_of_the_discrete_gaussian(stddev: float, source: str) -> None:
    uniform = entropy.uniform if source == "entropy" else np.random.default_rng(0).random
    drawn = discrete_gaussian(stddev, 200_000, uniform)
    reach, far = math.ceil(2.5 * stddev), math.ceil(12 * stddev)
    exact = probabilities(stddev, far)
    # What lies farther out is counted with the last numbers.
    expected = np.bincount(np.clip(np.arange(-far, far + 1), -reach, reach) + reach, weights=exact)
    counted = np.bincount(np.clip(drawn, -reach, reach) + reach, minlength=2 * reach + 1)
    assert stats.chisquare(counted, expected * len(drawn)).pvalue > 1e-6


@pytest.mark.parametrize("stddev", [50.0, 1e4, 3e7])
def test_wide_noise_is_normal_for_the_eye(stddev: float) -> None:
    drawn = discrete_gaussian(stddev, 100_000, np.random.default_rng(1).random)
    assert stats.kstest((drawn + np.random.default_rng(2).random(len(drawn)) - 0.5) / stddev, "norm").pvalue > 1e-3


@given(
    size=st.integers(1, 300),
    norm=st.floats(1e-3, 1e3),
    clients=st.integers(2, 2000),
    share=st.floats(0.5, 1),
    sigma=st.floats(0.1, 50),
    length=st.floats(0, 10),
    seed=st.integers(0, 2**32),
)
def test_no_sum_overflows_and_no_client_changes_more_than_is_stated(
    size: int, norm: float, clients: int, share: float, sigma: float, length: float, seed: int
) -> None:
    noisy = NoisySum.of(sigma, norm, size, clients, max(1, int(share * clients)))
    assert clients * noisy.norm + TAIL * noisy.stddev * math.sqrt(clients) < 2**31
    rng = np.random.default_rng(seed)
    vector = rng.standard_normal(size)
    vector *= length * norm / np.linalg.norm(vector)
    silent = NoisySum(noisy.scale, noisy.norm, 0.0, norm, size)
    whole = silent.encode(vector, rng.random)
    assert np.linalg.norm(whole) <= noisy.norm
    assert np.abs(whole / noisy.scale - vector * min(1, 1 / max(length, 1e-9))).max() <= 1 / noisy.scale * (1 + 1e-6)


@given(seed=st.integers(0, 2**32), size=st.integers(1, 50), norm=st.floats(0.1, 30))
def test_rounding_keeps_to_the_norm_and_is_right_on_average(seed: int, size: int, norm: float) -> None:
    rng = np.random.default_rng(seed)
    vector = rng.standard_normal(size)
    vector *= norm / np.linalg.norm(vector)
    bound = rounded_norm(norm, size)
    assert norm <= bound <= norm + math.sqrt(size)
    drawn = np.floor(vector) + (rng.random((2000, size)) < vector - np.floor(vector))
    assert (np.linalg.norm(drawn, axis=1) <= bound).mean() > 0.39 - 0.05


@pytest.mark.parametrize("stddev", [0.5, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("summands", [1, 2, 5])
@pytest.mark.parametrize("change", [1, 3])
def test_divergences_of_the_sum_are_within_the_bound(stddev: float, summands: int, change: int) -> None:
    one = probabilities(stddev, math.ceil(40 * stddev))
    total = one
    for _ in range(summands - 1):
        total = np.convolve(total, one)
    sigma = NoisySum(1.0, change, stddev, 1.0, 1).noise_multiplier(summands)
    p, q = total[change:], total[:-change]
    there = (p > 0) & (q > 0)
    # The terms of an order are largest at order * change, which has to lie where probabilities are no zeros yet.
    for order in (order for order in (1.5, 2, 3, 4, 8, 16) if order * change < 15 * stddev):
        divergence = np.logaddexp.reduce(order * np.log(p[there]) + (1 - order) * np.log(q[there])) / (order - 1)
        assert divergence <= order / (2 * sigma**2) * (1 + 1e-9)
        # It is not far above, where the sum is nearly a discrete Gaussian.
        if tau(stddev, summands) < 1e-6:
            assert divergence >= 0.95 * order / (2 * sigma**2)


@given(sigma=st.floats(0.05, 100), clients=st.integers(2, 3000), share=st.floats(0.5, 1), size=st.integers(1, 10**6))
def test_the_promised_noise_is_the_stated_one_and_more_clients_give_more(
    sigma: float, clients: int, share: float, size: int
) -> None:
    promised = max(1, int(share * clients))
    try:
        noisy = NoisySum.of(sigma, 1.0, size, clients, promised)
    except InputError:
        assume(False)
    found = [noisy.noise_multiplier(count) for count in range(promised, clients + 1, max(1, clients // 10))]
    assert found[0] == pytest.approx(sigma, rel=1e-9)
    assert found[0] >= sigma * (1 - 1e-9)
    assert found == sorted(found)
    assert noisy.noise_multiplier(clients) == pytest.approx(sigma * math.sqrt(clients / promised))


def test_too_few_whole_numbers_are_refused() -> None:
    message = r"privacy\.noise_multiplier = 1000\.0: leaves too few whole numbers below 2\^32"
    with pytest.raises(InputError, match=message):
        NoisySum.of(1e3, 1.0, 10**9, 10**5, 10**4)
