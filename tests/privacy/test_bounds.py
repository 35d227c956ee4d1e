"""Whatever a config says of privacy is refused in one line or has a plan that means something, and soon."""

from __future__ import annotations

import math
import time
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fedlora.config import MAX_EPSILON, MAX_NOISE, MIN_NOISE, load_config
from fedlora.errors import InputError
from fedlora.privacy import Ledger, plan_privacy
from fedlora.privacy.accountants import rdp
from fedlora.privacy.calibration import MAX_STEPS, PrivacyPlan, noise_multiplier, spent_epsilon

SECONDS = 20.0
"""Of CPU time, which other work on the machine does not change: the longest of all takes about 5."""

magnitudes = st.floats(-320, 308).map(lambda e: 10.0**e)
numbers = st.one_of(
    magnitudes,
    st.floats(),
    st.floats(0.05, 50),
    st.sampled_from([0.0, -1.0, 5e-324, 1e308, math.inf, math.nan, 1, 8, 10**400, "8", True, None]),
)


def mutated(privacy: dict[str, Any], rounds: Any = 8, local_steps: Any = 5, batch_size: Any = 32) -> dict[str, Any]:
    return {
        "run": {"rounds": rounds},
        "model": {"name": "tiny"},
        "data": {"name": "tiny", "partition": {"clients": 2}},
        "method": {"name": "fedit"},
        "client": {"batch_size": batch_size, "local_steps": local_steps},
        "privacy": {"mode": "example", **privacy},
    }


def plan_or_line(content: dict[str, Any], examples: int) -> PrivacyPlan | None:
    """Return the plan, or None after checking the line; both within ``SECONDS``."""
    began = time.process_time()
    plan = error = None
    try:
        plan = plan_privacy(load_config(content), examples)
    except InputError as refusal:
        error = refusal
    assert time.process_time() - began < SECONDS
    if error is not None:
        assert "\n" not in str(error)
        assert error.field.partition(".")[0] in ("privacy", "run", "client")
        assert len(error.remedy) > 10
    return plan


def check_sense(plan: PrivacyPlan) -> None:
    history = (*plan.start, (plan.noise_multiplier, plan.sample_rate, plan.steps))
    began = time.process_time()
    epsilon = spent_epsilon(plan.accountant, plan.delta, history)
    assert time.process_time() - began < SECONDS
    assert 0 < plan.sample_rate <= 1
    assert 1e-12 <= plan.delta < 1
    assert 1e-6 <= plan.max_grad_norm <= 1e6
    assert 1 <= plan.steps <= MAX_STEPS
    if plan.ceiling is None and plan.noise_multiplier == 0:
        assert epsilon == math.inf
        return
    assert MIN_NOISE <= plan.noise_multiplier <= MAX_NOISE
    assert 0 <= epsilon < math.inf
    if plan.ceiling is not None:
        assert epsilon <= plan.ceiling <= MAX_EPSILON


@settings(max_examples=150)
@given(
    st.fixed_dictionaries(
        {"accountant": st.sampled_from(["rdp", "gdp", "rdp", "gdp", "prv"])},
        optional={
            "target_epsilon": numbers,
            "noise_multiplier": numbers,
            "target_delta": numbers,
            "max_grad_norm": numbers,
        },
    ),
    st.one_of(st.integers(1, 100), st.integers(0, 10**12)),
    st.one_of(st.integers(1, 100), st.integers(0, 10**12)),
    st.one_of(st.integers(1, 100), st.integers(1, 10**9)),
    st.one_of(st.integers(1, 100), st.integers(1, 10**9)),
)
def test_mutated_privacy_is_a_line_or_a_plan_that_makes_sense(privacy, rounds, local_steps, batch_size, examples):
    given_ = {key: value for key, value in privacy.items() if value is not None}
    plan = plan_or_line(mutated(given_, rounds, local_steps, batch_size), examples)
    if plan is not None:
        check_sense(plan)


@settings(max_examples=60)
@given(
    st.sampled_from(["rdp", "gdp", "rdp", "gdp", "prv"]),
    st.booleans(),
    st.floats(-2, 3).map(lambda e: 10.0**e),
    st.floats(-12, 0).map(lambda e: 10.0**e),
    st.floats(0, 9).map(lambda e: int(10**e)),
    st.integers(1, 4000),
    st.integers(1, 4000),
)
def test_what_lies_in_the_ranges_has_a_plan(accountant, noise, size, delta, steps, batch_size, examples):
    assume(delta * examples < 1)
    key = "noise_multiplier" if noise else "target_epsilon"
    content = mutated({key: size, "target_delta": delta, "accountant": accountant}, 1, steps, batch_size)
    plan = plan_or_line(content, examples)
    # Small budgets are out of reach of many steps.
    assert plan is not None or size < 1 or delta < 1e-9 or steps > 10**4 or accountant == "gdp"
    if plan is not None:
        check_sense(plan)


FORMERLY = [
    {"noise_multiplier": 1e4},
    {"noise_multiplier": 1e8},
    {"noise_multiplier": 1e160},
    {"noise_multiplier": 1e-200},
    {"noise_multiplier": 0.02, "accountant": "gdp"},
    {"noise_multiplier": 0.1, "accountant": "gdp", "target_delta": 0.01},
    {"noise_multiplier": 0.01, "accountant": "prv"},
    {"target_epsilon": 1e308},
    {"target_epsilon": 1e-3},
    {"target_epsilon": 1e-12, "accountant": "gdp"},
    {"target_epsilon": 1000.0, "accountant": "prv"},
    {"target_epsilon": 1000.0},
    {"target_epsilon": 8.0, "target_delta": 1e-300, "accountant": "prv"},
    {"target_epsilon": 8.0, "target_delta": 5e-324},
    {"target_epsilon": 8.0, "max_grad_norm": 1e300},
    {"target_epsilon": 8.0, "max_grad_norm": math.inf},
    {"target_epsilon": 8.0, "max_grad_norm": 1e-300},
]
"""Values that once hung, crashed, or were taken though they mean nothing."""


@pytest.mark.parametrize("privacy", FORMERLY, ids=repr)
@pytest.mark.parametrize("examples", [64, 32])  # a rate of 1/2, and of 1
def test_values_that_once_hung_or_crashed(privacy, examples):
    plan = plan_or_line(mutated(privacy), examples)
    if plan is not None:
        check_sense(plan)


@pytest.mark.parametrize(("steps", "fine"), [(10**4, True), (10**4 + 1, False), (10**5, False)])
def test_steps_beyond_what_is_counted_are_refused(steps, fine):
    content = mutated({"target_epsilon": 8.0}, 10**5, steps)
    if fine:
        assert plan_or_line(content, 10**4) is not None
    else:
        with pytest.raises(InputError, match="lower it") as caught:
            plan_privacy(load_config(content), 10**4)
        assert caught.value.field == "run.rounds"


@settings(max_examples=60)
@given(
    st.sampled_from(["rdp", "gdp", "rdp", "prv"]),
    st.floats(-300, 0).map(lambda e: 10.0**e),
    st.lists(
        st.tuples(magnitudes, st.floats(-12, 0).map(lambda e: 10.0**e), st.integers(1, 10**18)), min_size=1, max_size=4
    ),
)
@example("prv", 1e-5, [(1.0, 0.01, 100)] * 200)
@example("prv", 1e-5, [(5.0 + k, 0.5, 1) for k in range(100)])
@example("gdp", 1e-5, [(1e160, 0.5, 1)])
@example("rdp", 1e-5, [(1e160, 0.5, 1), (1e-160, 0.5, 1)])
def test_whatever_a_ledger_holds_is_counted(accountant, delta, history):
    """Also what an older ledger has, or one that a server filled: a ledger without an answer would stop its owner."""
    began = time.process_time()
    epsilon = Ledger(accountant, delta, history).epsilon()
    assert time.process_time() - began < SECONDS
    assert epsilon >= 0
    if any(sigma < MIN_NOISE for sigma, _, _ in history):
        assert epsilon == math.inf


@pytest.mark.parametrize("rate", [1e-7, 0.1, 0.5])
@pytest.mark.parametrize("sigma", [1.0, 3000.0])
def test_a_steps_divergence_is_the_integral_that_defines_it(rate, sigma):
    """To 30 digits: A = E (1 + q y)^alpha over z ~ N(0, sigma^2), y = exp((2 z - 1) / (2 sigma^2)) - 1."""
    found = {alpha: rdp._small_divergence(sigma, rate, place) for place, alpha in enumerate(rdp._ORDERS)}
    with mpmath.workdps(30):
        q, s = mpmath.mpf(rate), mpmath.mpf(sigma)
        for alpha in (1.1, 4.7, 24):

            def density(z, a=alpha):
                y = mpmath.expm1((2 * z - 1) / (2 * s**2))
                return ((1 + q * y) ** mpmath.mpf(a) - 1 - a * q * y) * mpmath.npdf(z, 0, s)

            points = [k * s for k in range(-12, 13, 2)]
            exact = mpmath.quad(density, sorted({*points, *(float(alpha) + p for p in points)}))
            assert found[alpha] == pytest.approx(float(mpmath.log1p(exact) / (alpha - 1)), rel=1e-9)


@given(
    st.lists(
        st.tuples(st.floats(0.1, 4.0), st.one_of(st.floats(1e-3, 1.0), st.just(1.0)), st.integers(1, 10**4)),
        min_size=1,
        max_size=3,
    ),
    st.floats(1e-9, 1e-2),
)
@example([(0.5, 0.12, 4)], 1e-3)  # the best order is between two whole ones
@pytest.mark.filterwarnings("ignore:Optimal order is the")
def test_orders_that_are_left_out_change_no_bit(history, delta):
    every = [sum(rdp._divergence(sigma, q, k) * n for sigma, q, n in history) for k in range(len(rdp._ORDERS))]
    assert rdp.Rdp().epsilon(delta, tuple(history)) == rdp._convert(np.array(every), delta)


def test_most_orders_are_left_out():
    rdp._divergence.cache_clear()
    rdp.Rdp().epsilon(1e-3, ((0.5, 0.12, 4),))
    assert 0 < rdp._divergence.cache_info().misses < len(rdp._ORDERS) / 8


@pytest.mark.parametrize(("rate", "sigma"), [(0.5, 0.99), (0.04, 0.6), (0.9, 0.8)])
def test_opacus_and_the_other_formula_meet(rate, sigma):
    """One is used for sigma up to 1, the other above; neither jumps."""
    below, above = (spent_epsilon("rdp", 1e-5, ((s, rate, 50),)) for s in (1.0, 1.0 + 1e-9))
    assert above == pytest.approx(below, rel=1e-6)
    assert spent_epsilon("rdp", 1e-5, ((sigma, rate, 50),)) > below


@pytest.mark.parametrize(("epsilon", "delta", "rate", "steps"), [(8.0, 1e-5, 0.5, 40), (0.5, 1e-9, 0.01, 10**6)])
def test_prv_never_asks_for_more_noise_than_rdp(epsilon, delta, rate, steps):
    by_rdp, by_prv = (noise_multiplier(epsilon, delta, rate, steps, accountant) for accountant in ("rdp", "prv"))
    assert by_prv <= by_rdp * (1 + 1e-3)
