"""What every accountant must do, whoever registers it."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedlora.config import MAX_GROUP, MAX_NOISE, MIN_NOISE, load_config
from fedlora.errors import InputError
from fedlora.node.config import PolicySection
from fedlora.privacy.accountants import Accountant, History, get_accountant
from fedlora.privacy.calibration import noise_multiplier, spent_epsilon
from fedlora.registry import ACCOUNTANTS
from tests.configs import override

SECONDS = 20.0
"""Of CPU time, for any question."""

steps = st.tuples(
    st.floats(math.log(MIN_NOISE), math.log(10 * MAX_NOISE)).map(math.exp), st.floats(1e-6, 1), st.integers(1, 10**6)
)
deltas = st.floats(-12, -1).map(lambda exponent: 10.0**exponent)


@pytest.fixture(params=ACCOUNTANTS.names())
def accountant(request: pytest.FixtureRequest) -> Accountant:
    return get_accountant(request.param)


@settings(max_examples=6)
@given(deltas, st.lists(steps, min_size=1, max_size=3).map(tuple))
def _answers(accountant: Accountant, delta: float, history: History) -> None:
    began = time.process_time()
    epsilon = accountant.epsilon(delta, history)
    assert time.process_time() - began < SECONDS
    assert isinstance(epsilon, float)
    assert epsilon >= 0  # not NaN


@pytest.mark.filterwarnings("ignore")
def test_every_history_has_an_answer_soon(accountant: Accountant) -> None:
    _answers(accountant)


@settings(max_examples=6)
@given(deltas, st.tuples(steps, st.integers(2, MAX_GROUP)))
def _answers_for_a_group(accountant: Accountant, delta: float, drawn: tuple[tuple[float, float, int], int]) -> None:
    began = time.process_time()
    epsilon = spent_epsilon(accountant.name, delta, ((*drawn[0], drawn[1]),))
    assert time.process_time() - began < SECONDS
    assert epsilon >= 0
    assert math.isinf(epsilon) or accountant.counts_groups


@pytest.mark.filterwarnings("ignore")
def test_every_group_has_an_answer_soon(accountant: Accountant) -> None:
    _answers_for_a_group(accountant)


def test_a_group_costs_more_than_one_and_adds_up(accountant: Accountant) -> None:
    entry, other = (3.0, 0.05, 100), (2.0, 0.02, 50)
    one, group = (spent_epsilon(accountant.name, 1e-5, (each,)) for each in (entry, (*entry, 3)))
    assert group > one
    both = spent_epsilon(accountant.name, 1e-5, ((*entry, 3), other))
    assert both >= group
    assert both == pytest.approx(spent_epsilon(accountant.name, 1e-5, (other, (*entry, 3))), rel=1e-6)


def test_more_costs_more(accountant: Accountant) -> None:
    sigma, rate, count = 2.0, 0.3, 20

    def epsilon(sigma: float = sigma, rate: float = rate, count: int = count, delta: float = 1e-5) -> float:
        return spent_epsilon(accountant.name, delta, ((sigma, rate, count),))

    assert 0 < epsilon() < math.inf
    assert epsilon(count=4 * count) > epsilon()
    assert epsilon(sigma=sigma / 1.5) > epsilon()
    assert epsilon(rate=rate / 2) <= epsilon()  # an accountant may leave sampling out
    assert epsilon(delta=1e-8) > epsilon()


def test_a_history_counts_by_what_is_in_it(accountant: Accountant) -> None:
    first, second = (1.0, 0.05, 200), (4.0, 0.1, 40)
    both = spent_epsilon(accountant.name, 1e-5, (first, second))
    assert both == pytest.approx(spent_epsilon(accountant.name, 1e-5, (second, first)), rel=1e-6)
    split = ((1.0, 0.05, 150), second, (1.0, 0.05, 50))
    assert both == pytest.approx(spent_epsilon(accountant.name, 1e-5, split), rel=1e-2)
    assert both > spent_epsilon(accountant.name, 1e-5, (first,))


def test_noise_is_calibrated_to_all_of_epsilon_and_no_more(accountant: Accountant) -> None:
    epsilon = 4.0
    sigma = noise_multiplier(epsilon, 1e-5, 0.05, 60, accountant.name)
    assert spent_epsilon(accountant.name, 1e-5, ((sigma, 0.05, 60),)) <= epsilon
    assert spent_epsilon(accountant.name, 1e-5, ((sigma * 0.998, 0.05, 60),)) > epsilon


@pytest.mark.parametrize(("sigma", "count"), [(0.6, 1), (2.0, 5), (10.0, 100)])
def test_a_bound_is_no_less_than_the_exact_epsilon(accountant: Accountant, sigma: float, count: int) -> None:
    """At rate 1 all steps together are one Gaussian mechanism, whose exact delta is known."""
    epsilon = spent_epsilon(accountant.name, 1e-5, ((sigma, 1.0, count),))
    mu = math.sqrt(count) / sigma
    delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    if accountant.is_bound:
        assert delta <= 1e-5
    else:
        assert accountant.note


def test_configs_take_its_name(accountant: Accountant) -> None:
    content = override("privacy.accountant", accountant.name)
    assert load_config(content).privacy.accountant == accountant.name
    if accountant.is_bound:
        assert PolicySection(accountant=accountant.name).accountant == accountant.name
    else:
        with pytest.raises(ValueError, match="never count too little"):
            PolicySection(accountant=accountant.name)


def test_other_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"privacy\.accountant = 'none-such': should be .*'rdp'"):
        load_config(override("privacy.accountant", "none-such"))
