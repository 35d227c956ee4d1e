"""Lower bounds are below the truth as often as they promise, and not by so much that they say nothing."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from fedlora.audit.bounds import OneRun, Releases, Trials, best_threshold, composed_epsilon
from fedlora.privacy.accountants.gdp import gaussian_epsilon
from fedlora.privacy.calibration import spent_epsilon

EPSILON = st.floats(0.1, 6)


def smallest_proof(canaries: int, epsilon: float, delta: float, confidence: float) -> int:
    """The fewest right guesses about all canaries that prove more than epsilon."""
    return next(
        (v for v in range(canaries + 1) if OneRun(canaries, canaries, v).p_value(epsilon, delta) < 1 - confidence),
        canaries + 1,
    )


def test_one_run_gives_the_published_figure() -> None:
    """Appendix D of arXiv 2305.08846: 75 of 100 guesses right, of 1000 canaries."""
    assert OneRun(1000, 100, 75).bound(1e-4, 0.95) == pytest.approx(0.673, abs=1e-3)
    assert OneRun(1000, 100, 50).bound(1e-4, 0.95) == 0


@given(canaries=st.integers(1, 60), data=st.data(), epsilon=EPSILON, delta=st.floats(0, 0.01))
def test_the_p_value_is_that_of_the_paper(canaries: int, data: st.DataObject, epsilon: float, delta: float) -> None:
    guesses = data.draw(st.integers(0, canaries))
    right = data.draw(st.integers(0, guesses))
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    at_least = sum(binom.pmf(k, guesses, chance) for k in range(right, guesses + 1))
    alpha = max(
        (sum(binom.pmf(k, guesses, chance) for k in range(right - i, right)) / i for i in range(1, right + 1)),
        default=0.0,
    )
    expected = min(1.0, at_least + 2 * canaries * delta * alpha)
    assert OneRun(canaries, guesses, right).p_value(epsilon, delta) == pytest.approx(expected, abs=1e-9)


@given(canaries=st.integers(20, 400), epsilon=EPSILON)
def test_one_run_covers_randomised_response(canaries: int, epsilon: float) -> None:
    """Each canary's bit is told rightly with chance e^eps / (1 + e^eps): the most that epsilon allows."""
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    first = smallest_proof(canaries, epsilon, 0, 0.95)
    assert binom.sf(first - 1, canaries, chance) <= 0.05
    # The next smaller number is not proof enough: the bound is tight.
    assert binom.sf(first - 2, canaries, chance) > 0.05 or first > canaries


@pytest.mark.parametrize(("epsilon", "least"), [(1.0, 0.8), (3.0, 2.4)])
def test_one_run_proves_most_of_epsilon_with_a_thousand_canaries(epsilon: float, least: float) -> None:
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    usual = int(binom.ppf(0.5, 1000, chance))
    assert least < OneRun(1000, 1000, usual).bound(1e-6, 0.95) < epsilon


def test_one_run_covers_bits_that_delta_gives_away() -> None:
    """A canary's bit is told outright with chance delta, else by randomised response."""
    canaries, epsilon, delta = 100, 1.0, 0.02
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    right = delta + (1 - delta) * chance
    assert binom.sf(smallest_proof(canaries, epsilon, delta, 0.95) - 1, canaries, right) <= 0.05
    # Without delta's part of the bound it would not hold.
    ignored = smallest_proof(canaries, epsilon, 0, 0.95)
    assert binom.sf(ignored - 1, canaries, right) > 0.05


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 3.0])
def test_trials_cover_randomised_response(epsilon: float) -> None:
    """Of all outcomes of 40 and 40 trials, those that prove more than the truth have a chance of 5 % at most."""
    count, wrong = 40, 1 / (1 + math.exp(epsilon))
    chances = binom.pmf(np.arange(count + 1), count, wrong)
    missed = sum(
        chances[a] * chances[b]
        for a, b in product(range(count + 1), repeat=2)
        if Trials(a, count, b, count).bound(0, 0.95) > epsilon
    )
    assert missed <= 0.05
    usual = round(1000 * wrong)
    assert 0.5 * epsilon < Trials(usual, 1000, usual, 1000).bound(0, 0.95) < epsilon


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_releases_cover_a_gaussian(mu: float) -> None:
    count, wrong, delta = 40, float(norm.cdf(-mu / 2)), 1e-5
    chances = binom.pmf(np.arange(count + 1), count, wrong)
    missed = sum(
        chances[a] * chances[b]
        for a, b in product(range(count + 1), repeat=2)
        if Releases(a, count, b, count).mu(0.95) > mu
    )
    assert missed <= 0.05
    usual = round(5000 * wrong)
    found = Releases(usual, 5000, usual, 5000, steps=3)
    truth = gaussian_epsilon(mu * math.sqrt(3), delta)
    assert 0.7 * truth < found.bound(delta, 0.95) < truth


@pytest.mark.parametrize(("sigma", "rate", "steps", "group"), [(2.0, 0.1, 30, 4), (4.0, 0.3, 8, 5), (4.0, 1.0, 3, 3)])
def test_releases_of_a_group_stay_below_its_mixture_of_gaussians(
    sigma: float, rate: float, steps: int, group: int
) -> None:
    usual = round(10**6 * float(norm.cdf(-group / sigma / 2)))
    found = Releases(usual, 10**6, usual, 10**6, rate, steps, group).bound(1e-3, 0.95)
    truth = spent_epsilon("prv", 1e-3, ((sigma, rate, steps, group),))
    assert 0.55 * truth < found < truth
    # One of its examples alone would be told apart less often.
    assert found > 1.2 * composed_epsilon(1 / sigma, rate, steps, 1e-3)


def test_nothing_is_proved_by_guesses_that_are_wrong() -> None:
    assert Trials(20, 40, 20, 40).bound(1e-5, 0.95) == 0
    assert Releases(40, 40, 40, 40).bound(1e-5, 0.95) == 0
    assert OneRun(40, 40, 0).bound(1e-5, 0.95) == 0
    assert Trials(0, 10**6, 0, 10**6).bound(1e-5, 0.95) > 10


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.0, 0.1, 30), (0.6, 0.02, 40), (3.0, 0.5, 50)])
def test_composed_epsilon_is_just_below_what_accountants_bound(sigma: float, rate: float, steps: int) -> None:
    found = composed_epsilon(1 / sigma, rate, steps, 1e-5)
    upper = spent_epsilon("prv", 1e-5, ((sigma, rate, steps),))
    assert 0.93 * upper - 0.02 < found <= upper


def test_a_gaussian_without_sampling_is_composed_exactly() -> None:
    assert composed_epsilon(0.5, 1.0, 16, 1e-5) == pytest.approx(composed_epsilon(2.0, 1.0, 1, 1e-5))
    upper = spent_epsilon("prv", 1e-5, ((2.0, 1.0, 16),))
    assert 0.97 * upper < composed_epsilon(0.5, 1.0, 16, 1e-5) <= upper


def test_the_threshold_is_where_most_is_proved() -> None:
    rng = np.random.default_rng(0)
    without, held = rng.standard_normal(20_000), 3 + rng.standard_normal(20_000)

    def proved(threshold: float) -> float:
        alarms, misses = (without > threshold).mean(), (held <= threshold).mean()
        return Trials(round(1000 * alarms), 1000, round(1000 * misses), 1000).bound(1e-5, 0.95)

    chosen = best_threshold(without, held, (1000, 1000), 1e-5)
    assert proved(chosen) >= max(proved(t) for t in np.linspace(-1, 4, 21)) - 0.05
