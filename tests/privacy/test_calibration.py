"""Noise is calibrated once, for all the steps of a federation, for each client by its own sampling rate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier
from scipy.stats import norm

from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.methods import get_method
from fedlora.privacy import PrivacyPlan, plan_privacy
from fedlora.privacy.accountants import get_accountant, prv
from fedlora.privacy.calibration import noise_multiplier, spent_epsilon
from fedlora.registry import ACCOUNTANTS
from tests import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:GDP accounting is experimental", "ignore:Optimal order is the", "ignore:divide by zero"
)


def config(rounds: int = 8, steps: int | None = 5, batch: int = 32, **privacy) -> Config:
    given = {"target_epsilon": 8.0, **privacy}
    client = {"batch_size": batch} if steps is None else {"batch_size": batch, "local_steps": steps}
    return tiny.settings(
        run={"rounds": rounds},
        client=client,
        privacy={"mode": "example", **{key: value for key, value in given.items() if value is not None}},
    )


def opacus_epsilon(accountant: str, sigma: float, rate: float, steps: int, delta: float = 1e-5) -> float:
    mechanism = create_accountant(accountant)
    mechanism.history = [(sigma, rate, steps)]
    return mechanism.get_epsilon(delta=delta)


@pytest.mark.parametrize(("examples", "sigma"), [(2500, 0.49), (32, 4.03), (7, 4.03)])
def test_the_figures_of_the_methods_document(examples, sigma):
    """Epsilon 8, 40 steps, batch 32, delta 1e-5."""
    plan = plan_privacy(config(), examples)
    assert plan.noise_multiplier == pytest.approx(sigma, abs=0.01)
    assert plan.sample_rate == min(1, 32 / examples)
    assert plan.expected_batch_size == pytest.approx(min(32, examples))
    assert (plan.steps, plan.delta, plan.ceiling, plan.max_grad_norm) == (40, 1e-5, 8.0, 1.0)


@settings(max_examples=8)
@given(
    accountant=st.sampled_from(["rdp", "gdp"]),
    epsilon=st.floats(0.5, 20),
    rate=st.floats(0.001, 1),
    steps=st.integers(1, 300),
)
@example(accountant="rdp", epsilon=8.0, rate=1.0, steps=40)
def test_all_the_steps_stay_within_epsilon_and_use_it_up(accountant, epsilon, rate, steps):
    sigma = noise_multiplier(epsilon, 1e-5, rate, steps, accountant)
    assert opacus_epsilon(accountant, sigma, rate, steps) <= epsilon
    assert opacus_epsilon(accountant, sigma * 0.998, rate, steps) > epsilon


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_opacus_own_search_asks_for_no_less_noise(accountant):
    """It stops as far as 0.01 in epsilon short of the target."""
    for epsilon in (0.5, 8.0):
        stock = get_noise_multiplier(
            target_epsilon=epsilon, target_delta=1e-5, sample_rate=0.02, steps=60, accountant=accountant
        )
        assert 0.97 * stock < noise_multiplier(epsilon, 1e-5, 0.02, 60, accountant) <= stock * (1 + 1e-3)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Accountants that were asked, each time that no answer was remembered."""
    asked: list[str] = []
    monkeypatch.setattr(prv, "create_accountant", lambda name: asked.append(name) or create_accountant(name))
    noise_multiplier.cache_clear()
    spent_epsilon.cache_clear()
    yield asked
    noise_multiplier.cache_clear()
    spent_epsilon.cache_clear()


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(8.0, 32 / 2500, 40), (1.0, 1.0, 20), (0.3, 0.02, 100)])
def test_the_prv_accountant_too(epsilon, rate, steps, asked):
    sigma = noise_multiplier(epsilon, 1e-5, rate, steps, "prv")
    # It takes up to seconds to answer, so it is asked close to the answer alone.
    assert asked.count("prv") <= 5
    assert epsilon * 0.98 < opacus_epsilon("prv", sigma, rate, steps) <= epsilon
    assert opacus_epsilon("prv", sigma * 0.998, rate, steps) > epsilon
    # It is the tighter bound.
    assert sigma < noise_multiplier(epsilon, 1e-5, rate, steps, "rdp")


def test_small_epsilons_are_reached(asked):
    by_rdp, by_prv = (noise_multiplier(0.1, 1e-5, 0.01, 20, accountant) for accountant in ("rdp", "prv"))
    assert by_prv < by_rdp
    assert opacus_epsilon("prv", by_prv, 0.01, 20) <= 0.1 < opacus_epsilon("prv", by_prv * 0.998, 0.01, 20)
    with pytest.raises(InputError, match="not reached by any noise under rdp"):
        noise_multiplier(0.001, 1e-5, 0.01, 20, "rdp")


def test_an_experts_start_fits_into_a_tenth_of_epsilon_1():
    options = get_method("flexmore").Options(name="flexmore")
    plan = plan_privacy(config(target_epsilon=1.0).model_copy(update={"method": options}), 400)
    assert 0.09 < spent_epsilon("rdp", 1e-5, tuple(plan.start)) <= 0.1
    steps = (plan.noise_multiplier, plan.sample_rate, plan.steps)
    assert 0.99 < spent_epsilon("rdp", 1e-5, (*plan.start, steps)) <= 1.0


def test_the_prv_accountant_covers_other_steps_too(asked):
    start = (3.0, 0.3, 1)
    sigma = noise_multiplier(4.0, 1e-5, 0.1, 20, "prv", (start,))
    assert spent_epsilon("prv", 1e-5, (start, (sigma, 0.1, 20))) <= 4.0
    assert spent_epsilon("prv", 1e-5, (start, (sigma * 0.998, 0.1, 20))) > 4.0
    assert asked.count("prv") <= 6


def test_noise_grows_with_steps_and_rate_and_falls_with_epsilon():
    base = noise_multiplier(4.0, 1e-5, 0.1, 50, "rdp")
    assert noise_multiplier(4.0, 1e-5, 0.1, 100, "rdp") > base
    assert noise_multiplier(4.0, 1e-5, 0.2, 50, "rdp") > base
    assert noise_multiplier(2.0, 1e-5, 0.1, 50, "rdp") > base
    assert noise_multiplier(4.0, 1e-7, 0.1, 50, "rdp") > base


def test_steps_are_those_of_all_rounds():
    assert plan_privacy(config(rounds=6, steps=7), 100).steps == 42
    # An epoch of 100 examples in batches of 32 is four steps.
    assert plan_privacy(config(rounds=6, steps=None), 100).steps == 24
    assert plan_privacy(config(rounds=6, steps=None), 20).steps == 6
    # Were noise calibrated for a single round, the federation would spend more.
    one = plan_privacy(config(rounds=1, steps=5), 2500).noise_multiplier
    assert spent_epsilon("rdp", 1e-5, ((one, 32 / 2500, 40),)) > 1.1 * 8


def test_each_client_has_its_own_noise():
    sigmas = [plan_privacy(config(), n).noise_multiplier for n in (32, 100, 400, 2500, 20000)]
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[0] > 8 * sigmas[-1]


def test_given_noise_has_no_ceiling():
    plan = plan_privacy(config(target_epsilon=None, noise_multiplier=0.7), 50)
    assert (plan.noise_multiplier, plan.ceiling) == (0.7, None)
    assert plan_privacy(config(target_epsilon=None, noise_multiplier=0.0), 50).noise_multiplier == 0


@pytest.mark.parametrize(
    ("delta", "examples", "fine"), [(0.01, 99, True), (0.01, 100, False), (0.01, 5000, False), (0.5, 1, True)]
)
def test_delta_is_below_one_in_n(delta, examples, fine):
    if fine:
        assert plan_privacy(config(target_delta=delta), examples).delta == delta
    else:
        with pytest.raises(InputError, match="below 1 / n") as caught:
            plan_privacy(config(target_delta=delta), examples)
        assert caught.value.field == "privacy.target_delta"


def named(caught: pytest.ExceptionInfo[InputError]) -> float:
    """Return the epsilon that an error says is reached."""
    assert caught.value.field == "privacy.target_epsilon"
    return float(re.search(r"raise it to ([\d.e-]+), the smallest that is$", str(caught.value))[1])


@pytest.mark.parametrize(
    ("accountant", "delta", "rate", "steps", "group"),
    [
        ("rdp", 1e-5, 1.0, 10, 1),
        ("prv", 1e-5, 1.0, 10, 1),
        ("prv", 1e-9, 0.001, 10, 1),  # less than rdp reaches, by less noise
        ("rdp", 1e-5, 1.0, 10**5, 1),
        ("gdp", 1e-9, 1.0, 10**5, 1),
        ("rdp", 1e-5, 0.2, 50, 3),
    ],
)
def test_an_epsilon_out_of_reach_is_told_with_the_smallest_within_reach(accountant, delta, rate, steps, group):
    """rdp has a floor, and prv an error of 0.01; Opacus' own search does not come back from the latter."""
    with pytest.raises(InputError, match=f"not reached by any noise under {accountant}; raise it to") as caught:
        noise_multiplier(0.005, delta, rate, steps, accountant, group=group)
    least = named(caught)
    assert least > 0.005
    assert noise_multiplier(least, delta, rate, steps, accountant, group=group) > 0
    with pytest.raises(InputError):
        noise_multiplier(0.98 * least, delta, rate, steps, accountant, group=group)


def test_no_epsilon_at_all_is_said_so():
    with pytest.raises(InputError, match=r"and neither is a larger one; lower run\.rounds"):
        noise_multiplier(8.0, 1e-5, 1.0, 10**9, "rdp", group=1000)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_a_start_from_examples_counts_in_the_smallest_within_reach(accountant):
    """A tenth of epsilon is the start's: what the error names is the whole."""
    options = get_method("flexmore").Options(name="flexmore")

    def plan(epsilon: float) -> PrivacyPlan:
        given = config(target_epsilon=epsilon, accountant=accountant)
        return plan_privacy(given.model_copy(update={"method": options}), 400)

    with pytest.raises(InputError, match=r"target_epsilon = 0\.05: is not reached") as caught:
        plan(0.05)
    least = named(caught)
    assert plan(least).start_noise_multiplier is not None
    with pytest.raises(InputError):
        plan(0.97 * least)


def test_extreme_budgets_have_an_answer():
    """Opacus' own search raises on gdp's, whose epsilon it seeks below 500."""
    for epsilon in (100.0, 1000.0):
        assert 0 < noise_multiplier(epsilon, 1e-5, 0.5, 10, "gdp") < 1
    assert 0 < noise_multiplier(1000.0, 1e-5, 1.0, 10, "rdp") < 0.1
    assert noise_multiplier(0.005, 1e-5, 0.5, 10, "gdp") > 100
    assert spent_epsilon("gdp", 1e-5, ((5.0, 1e-6, 1),)) == 0
    assert spent_epsilon("rdp", 1e-3, ((1000.0, 1.0, 1),)) == 0
    assert spent_epsilon("gdp", 1e-5, ((0.02, 1.0, 10),)) == math.inf


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_epsilon_of_nothing_and_of_no_noise(accountant):
    assert spent_epsilon(accountant, 1e-5, ()) == 0
    assert spent_epsilon(accountant, 1e-5, ((1.0, 0.1, 5), (0.0, 0.1, 1))) == math.inf


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_unlike_steps_add_up(accountant):
    """Opacus' gdp accountant reads the last entry of a history alone."""
    first, second = (1.0, 0.05, 200), (4.0, 0.01, 10)
    both = spent_epsilon(accountant, 1e-5, (first, second))
    # prv's error of 0.01 may hide the second, far smaller part.
    assert both > spent_epsilon(accountant, 1e-5, (first,)) - (0.01 if accountant == "prv" else 0)
    assert both > 2 * spent_epsilon(accountant, 1e-5, (second,))
    assert spent_epsilon(accountant, 1e-5, (second, first)) == pytest.approx(both, rel=1e-6)
    # Steps of one kind in two entries are the same steps.
    halves = spent_epsilon(accountant, 1e-5, ((1.0, 0.05, 150), (1.0, 0.05, 50)))
    assert halves == pytest.approx(spent_epsilon(accountant, 1e-5, (first,)), rel=1e-3)


@pytest.mark.parametrize("accountant", [name for name in ACCOUNTANTS.names() if get_accountant(name).is_bound])
@pytest.mark.parametrize(("sigma", "rate"), [(0.4, 0.001), (0.5, 0.01), (0.7, 0.05), (1.0, 0.1), (2.0, 0.5)])
def test_what_an_owner_counts_by_is_never_less_than_one_steps_own_epsilon(accountant, sigma, rate):
    """The exact delta of (1 - q) N(0, sigma^2) + q N(1, sigma^2) against N(0, sigma^2), at the epsilon that is told."""
    epsilon = spent_epsilon(accountant, 1e-5, ((sigma, rate, 1),))
    edge = sigma**2 * math.log((math.exp(epsilon) - 1 + rate) / rate) + 0.5
    with_it, without = norm.sf((edge - 1) / sigma), norm.sf(edge / sigma)
    assert rate * with_it + (1 - rate - math.exp(epsilon)) * without <= 1e-5
