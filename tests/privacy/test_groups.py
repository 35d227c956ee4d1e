"""Units with several examples in a step: the mixture of Gaussians, by integrals and by dp-accounting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binom

from fedlora.config import load_config
from fedlora.errors import InputError
from fedlora.privacy import Ledger, plan_privacy
from fedlora.privacy.accountants import steps_of
from fedlora.privacy.accountants._groups import GroupStep
from fedlora.privacy.calibration import noise_multiplier, spent_epsilon
from fedlora.privacy.units import compare_units, unit_advice
from tests.configs import override

CASES = [(4.0, 0.05, 200, 5), (5.0, 1.0, 10, 4), (10.0, 0.02, 500, 20)]


def tight(delta: float, *steps: tuple[float, float, int, int]) -> float:
    """Epsilon by Google's privacy loss distributions."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)  # its own 1e-4 changes no epsilon by 3e-4
    for sigma, rate, count, k in steps:
        j = range(k + 1)
        accountant.compose(MixtureOfGaussiansDpEvent(sigma, list(j), list(binom.pmf(j, k, rate))), count)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_epsilon_is_dp_accountings(case: tuple[float, float, int, int]) -> None:
    exact = tight(1e-5, case)
    assert exact <= spent_epsilon("prv", 1e-5, (case,)) <= 1.02 * exact
    assert exact <= spent_epsilon("rdp", 1e-5, (case,)) <= 1.2 * exact  # an upper bound, as for single examples


def test_unlike_steps_of_groups_and_of_single_examples_add_up() -> None:
    steps = (4.0, 0.05, 100, 5), (1.5, 0.02, 100, 1), (3.0, 0.1, 30, 3)
    history = tuple(steps_of(*each) for each in steps)
    assert [len(entry) for entry in history] == [4, 3, 4]
    exact = tight(1e-5, *steps)
    assert exact <= spent_epsilon("prv", 1e-5, history) <= 1.02 * exact
    assert exact <= spent_epsilon("rdp", 1e-5, history) <= 1.2 * exact


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("accountant", "tolerance"), [("rdp", 1e-3), ("prv", 1e-5), ("gdp", 1e-9)])
def test_a_group_of_one_is_a_single_example(accountant: str, tolerance: float) -> None:
    """rdp has fewer orders for groups."""
    from fedlora.privacy.accountants import get_accountant

    for sigma, rate, count in ((1.0, 0.05, 200), (2.0, 1.0, 10), (0.7, 0.01, 500)):
        group = get_accountant(accountant).group_epsilon(1e-5, ((sigma, rate, count, 1),))
        single = get_accountant(accountant).epsilon(1e-5, ((sigma, rate, count),))
        assert single * (1 - tolerance) <= group <= single * (1 + tolerance)


@settings(max_examples=8)
@given(st.floats(2.0, 20.0), st.floats(0.01, 0.99), st.integers(2, 8))
@example(3.0, 0.5, 8)
def test_divergences_are_the_integrals_that_define_them(sigma: float, rate: float, group: int) -> None:
    orders = np.array([1.3, 4.4, 9.0])
    j = np.arange(group + 1)
    weights = binom.pmf(j, group, rate)

    def log_ratio(x: float) -> float:
        return float(np.log(weights @ np.exp((2 * j * x - j**2) / (2 * sigma**2))))

    def integral(power: float, low: float, high: float) -> float:
        def density(x: float) -> float:
            return math.exp(power * log_ratio(x) - x**2 / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))

        points = np.arange(low, high, 2 * sigma)
        return sum(quad(density, a, a + 2 * sigma, epsabs=0, epsrel=1e-11)[0] for a in points)

    for order, found in zip(orders, GroupStep(sigma, rate, group).divergences(orders), strict=True):
        reach = order * group + 10 * sigma
        exact = max(integral(order, -10 * sigma, reach), integral(1 - order, -reach, 10 * sigma))
        assert found == pytest.approx(math.log(exact) / (order - 1), rel=1e-6, abs=1e-10)


def test_a_group_that_is_always_there_is_one_large_step() -> None:
    """The Gaussian mechanism of sensitivity k: order a has a k^2 / (2 sigma^2)."""
    orders = np.array([1.5, 2.0, 8.0, 30.0])
    for sigma, k in ((2.0, 3), (10.0, 12), (0.5, 2)):
        assert GroupStep(sigma, 1.0, k).divergences(orders) == pytest.approx(orders * k**2 / (2 * sigma**2), rel=1e-9)
    assert spent_epsilon("rdp", 1e-5, ((6.0, 1.0, 5, 3),)) == pytest.approx(
        spent_epsilon("rdp", 1e-5, ((2.0, 1.0, 5),)), rel=0.01
    )


@settings(max_examples=20)
@given(st.floats(0.5, 50.0), st.floats(1e-3, 1.0), st.integers(1, 40), st.integers(1, 500), st.floats(1e-9, 1e-2))
def test_a_larger_group_is_never_protected_better(
    sigma: float, rate: float, group: int, count: int, delta: float
) -> None:
    """Nor less than the crudest bound says: that all of the group is there wherever one of it is."""
    one, more = (spent_epsilon("rdp", delta, (steps_of(sigma, rate, count, k),)) for k in (group, 2 * group))
    assert more >= one * (1 - 1e-9)
    any_of_it = 1 - (1 - rate) ** group
    crude = spent_epsilon("rdp", delta, ((sigma / group, any_of_it, count),))
    assert one <= crude * (1 + 5e-3)


def test_what_cannot_be_computed_is_infinite() -> None:
    assert spent_epsilon("rdp", 1e-5, ((0.05, 0.5, 10, 900),)) == math.inf
    assert spent_epsilon("prv", 1e-5, ((0.0, 0.5, 10, 3),)) == math.inf


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_noise_for_groups_uses_up_epsilon(accountant: str) -> None:
    sigma = noise_multiplier(4.0, 1e-5, 0.05, 60, accountant, group=4)
    assert spent_epsilon(accountant, 1e-5, ((sigma, 0.05, 60, 4),)) <= 4.0
    assert spent_epsilon(accountant, 1e-5, ((sigma * 0.998, 0.05, 60, 4),)) > 4.0
    assert sigma > noise_multiplier(4.0, 1e-5, 0.05, 60, accountant)


def protected(**privacy: object) -> dict[str, object]:
    content = override("client", {"batch_size": 20, "local_steps": 5})
    content["privacy"] = {"mode": "example", "target_epsilon": 4.0, "target_delta": 1e-3, "unit": "movie", **privacy}
    return content


def test_plans_by_person_and_by_example() -> None:
    uls = load_config(protected(examples_per_unit=6))
    plan = plan_privacy(uls, 200)
    assert (plan.samples_units, plan.examples_per_unit, plan.group) == (True, 6, 1)
    assert (plan.sample_rate, plan.expected_batch_size) == (0.1, 20)
    els = load_config(protected(examples_per_unit=6, user_mechanism="els"))
    found = plan_privacy(els, 1200, 200)  # delta is below 1 / 200, not below 1 / 1200
    assert (found.samples_units, found.group, found.sample_rate) == (False, 6, 1 / 60)
    with pytest.raises(InputError, match="1200 persons"):
        plan_privacy(uls, 1200)
    ledger = Ledger("rdp", 1e-3)
    ledger.charge(found, found.steps)
    assert 0.99 * 4.0 < ledger.epsilon() <= 4.0
    assert ledger.history == [(found.noise_multiplier, 1 / 60, found.steps, 6)]
    again = Ledger.from_record(ledger.to_record())
    assert again.history == ledger.history
    assert again.epsilon() == ledger.epsilon()


@pytest.mark.parametrize(
    ("privacy", "field"),
    [
        ({"user_mechanism": "els"}, "privacy.examples_per_unit"),
        ({"mode": "client"}, "privacy.unit"),
        ({"user_mechanism": "els", "examples_per_unit": 1001}, "privacy.examples_per_unit"),
    ],
)
def test_what_cannot_be_protected_is_refused(privacy: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(protected(**privacy))
    assert caught.value.field == field


def test_a_start_that_draws_single_examples_is_refused() -> None:
    content = protected()
    content["model"] = {"name": "tiny", "task": "causal-lm"}
    content["method"] = {"name": "flexmore"}
    with pytest.raises(InputError, match="draws single examples") as caught:
        load_config(content)
    assert caught.value.field == "privacy.unit"


def test_the_ways_are_compared_at_equal_gradients() -> None:
    sizes = np.array([1] * 50 + [4] * 100 + [30] * 50)
    uls, els = compare_units(load_config(protected(examples_per_unit=4)), sizes)
    assert (uls.user_mechanism, els.user_mechanism) == ("uls", "els")
    assert uls.gradients == pytest.approx(20 * 3.25)
    assert els.gradients == pytest.approx(uls.gradients, rel=0.02)
    for one in (uls, els):
        batch = one.batch_size
        assert one.effective_noise == pytest.approx(one.noise_multiplier / batch, rel=1e-9)
    assert uls.noise_multiplier == plan_privacy(load_config(protected()), 200).noise_multiplier
    less = min((uls, els), key=lambda one: one.effective_noise).user_mechanism
    assert unit_advice([uls, els]).endswith(f"{less} needs less")
    own, other = compare_units(load_config(protected(examples_per_unit=4, user_mechanism="els")), sizes)
    assert (own.user_mechanism, other.user_mechanism) == ("els", "uls")
    assert own.gradients == 20
    given = load_config({**protected(), "privacy": {"mode": "example", "noise_multiplier": 1.0, "unit": "movie"}})
    assert unit_advice(compare_units(given, sizes)) == ""
