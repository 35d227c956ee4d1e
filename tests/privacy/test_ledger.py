"""One ledger a client, over all rounds: it adds up, survives storage, and stops at its ceiling."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants import create_accountant

from fedlora.errors import BudgetError
from fedlora.privacy import Ledger, PrivacyPlan, plan_privacy
from fedlora.privacy.calibration import local_steps, spent_epsilon
from fedlora.training import train_cohort
from tests import tiny

ACCOUNTANTS = ["rdp", "prv", "gdp"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:GDP accounting is experimental", "ignore:Optimal order is the", "ignore:divide by zero"
)


def plan(sigma: float = 1.0, rate: float = 0.1, accountant: str = "rdp", ceiling: float | None = None) -> PrivacyPlan:
    return PrivacyPlan(rate, sigma, 1.0, 4.0, 50, 1e-5, accountant, ceiling)


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_epsilon_grows_and_equals_a_recomputation(accountant):
    ledger = Ledger(accountant, 1e-5)
    assert ledger.epsilon() == 0
    spent = []
    for _ in range(5):
        ledger.charge(plan(accountant=accountant), 7)
        spent.append(ledger.epsilon())
    assert spent == sorted(spent)
    assert spent[-1] > 1.3 * spent[0]
    assert ledger.steps == 35
    # One accountant, one step at a time, as Opacus' engine would.
    mechanism = create_accountant(accountant)
    for _ in range(35):
        mechanism.step(noise_multiplier=1.0, sample_rate=0.1)
    assert spent[-1] == pytest.approx(mechanism.get_epsilon(delta=1e-5), rel=1e-9)


def test_a_fresh_engine_a_round_would_hide_the_spending():
    """The commonest mistake: five rounds that each report the epsilon of one."""
    ledger, one = Ledger("rdp", 1e-5), Ledger("rdp", 1e-5)
    one.charge(plan(), 7)
    for _ in range(5):
        ledger.charge(plan(), 7)
    assert ledger.epsilon() > 1.3 * one.epsilon()


@given(
    st.lists(
        st.tuples(st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.01, 0.3, 1.0]), st.integers(0, 9)), max_size=8
    ),
    st.sampled_from(["rdp", "gdp"]),
)
def test_it_survives_a_flower_record(charges, accountant):
    ledger = Ledger(accountant, 1e-6)
    for sigma, rate, steps in charges:
        ledger.charge(plan(sigma, rate, accountant), steps)
    record = ConfigRecord(ledger.to_record())
    again = Ledger.from_record(record)
    assert again.history == ledger.history
    assert (again.accountant, again.delta) == (accountant, 1e-6)
    assert again.steps == ledger.steps == sum(steps for _, _, steps in charges)
    assert again.epsilon() == ledger.epsilon()
    # Goes on where it was, and does not grow by an entry a round.
    for book in (ledger, again):
        for _ in range(3):
            book.charge(plan(2.0, 0.5, accountant), 1)
    assert again.history == ledger.history
    assert len(again.history) <= len([c for c in charges if c[2]]) + 1
    # The record is a copy.
    assert Ledger.from_record(record).steps == again.steps - 3


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_it_stops_hard_at_the_ceiling(accountant):
    epsilon = 3.0
    config = tiny.settings(
        run={"rounds": 4},
        client={"batch_size": 8, "local_steps": 5},
        privacy={"mode": "example", "target_epsilon": epsilon, "accountant": accountant},
    )
    private = plan_privacy(config, 100)
    ledger = Ledger(accountant, private.delta)
    for _ in range(4):
        ledger.check(private, local_steps(config, 100))
        ledger.charge(private, 5)
    assert ledger.steps == private.steps == 20
    assert epsilon * 0.97 < ledger.epsilon() <= epsilon
    before = list(ledger.history)
    with pytest.raises(BudgetError, match=r"5 more steps .* from 2\.9|5 more steps .* from 3 to 3\.") as caught:
        ledger.check(private, 5)
    assert "ceiling of 3" in str(caught.value)
    with pytest.raises(BudgetError):
        ledger.check(private, 1)
    # What is refused is not charged.
    assert ledger.history == before
    # Without a ceiling the spending is counted and nothing refused.
    ledger.check(replace(private, ceiling=None), 500)


def test_steps_without_noise_have_no_epsilon():
    ledger = Ledger("rdp", 1e-5)
    ledger.charge(plan(0.0), 1)
    assert ledger.epsilon() == math.inf
    with pytest.raises(BudgetError):
        ledger.check(plan(ceiling=8.0), 1)


def test_no_steps_cost_nothing():
    ledger = Ledger("rdp", 1e-5)
    ledger.charge(plan(), 0)
    assert ledger.history == []
    assert ledger.epsilon() == 0


def test_what_training_reports_is_what_it_took():
    """The steps that a result carries, over rounds, are those that noise was calibrated for."""
    rounds, n = 3, 10
    config = tiny.settings(
        run={"rounds": rounds},
        client={"optimizer": "sgd", "batch_size": 4, "local_epochs": 2},
        privacy={"mode": "example", "target_epsilon": 5.0},
    )
    adapted = tiny.adapted_model("bert", config)
    private = plan_privacy(config, n)
    ledger = Ledger("rdp", private.delta)
    arrays = adapted.arrays(tiny.trained_names(adapted, config))
    for server_round in range(1, rounds + 1):
        job = tiny.jobs_of([arrays], [np.arange(n)], [private], server_round)[0]
        result = train_cohort(adapted, tiny.table("bert", n), [job], config)[0]
        ledger.check(private, result.steps)
        ledger.charge(private, result.steps)
        arrays = result.arrays
    assert ledger.history == [(private.noise_multiplier, 0.4, private.steps)]
    assert private.steps == rounds * 2 * 3
    assert ledger.epsilon() <= 5.0


def test_a_start_from_the_clients_examples_is_charged_once_and_counts_against_the_ceiling():
    config = tiny.settings(
        "llama",
        run={"rounds": 4},
        method={"name": "flexmore", "router_documents": 500},
        client={"batch_size": 32, "local_steps": 5},
        privacy={"mode": "example", "target_epsilon": 8.0},
    )
    found = plan_privacy(config, 1000)
    assert found.start_sample_rate == 0.5
    start = (found.start_noise_multiplier, 0.5, 1)
    assert spent_epsilon("rdp", 1e-5, (start,)) == pytest.approx(0.8, rel=0.01)
    ledger = Ledger("rdp", 1e-5)
    for round_ in range(4):
        ledger.check(found, 5, start=round_ == 0)
        ledger.charge(found, 5, start=round_ == 0)
    assert ledger.history == [start, (found.noise_multiplier, found.sample_rate, 20)]
    assert 8.0 * 0.98 < ledger.epsilon() <= 8.0
    with pytest.raises(BudgetError):
        ledger.check(found, 1)
    # The same steps without the start leave something of the budget; one more start would pass the ceiling.
    steps = Ledger("rdp", 1e-5)
    steps.charge(found, 20)
    assert steps.epsilon() < ledger.epsilon()
    with pytest.raises(BudgetError):
        ledger.check(found, 0, start=True)
    # A start from public text reads nothing.
    public = config.model_copy(update={"method": config.method.model_copy(update={"router_init": "public"})})
    assert plan_privacy(public, 1000).start_noise_multiplier is None
    assert plan_privacy(public, 1000).noise_multiplier < found.noise_multiplier
