"""What every mechanism must say, whoever registers it."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import MetricRecord

from fedlora.config import load_config, unused_keys
from fedlora.errors import InputError
from fedlora.privacy.mechanisms import Mechanism, get_mechanism, mechanism_of
from fedlora.registry import MECHANISMS
from fedlora.strategies.replies import ReplyError, read_metrics
from tests.configs import override


@pytest.fixture(params=MECHANISMS.names())
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    return get_mechanism(request.param)


def private(mechanism: Mechanism, **privacy: Any) -> dict[str, Any]:
    budget = {"target_epsilon": 8.0, "target_delta": 1e-3} if mechanism.is_private else {}
    return override("privacy", {"mode": mechanism.name, **budget, **privacy})


def test_a_config_has_it(mechanism: Mechanism) -> None:
    assert mechanism_of(load_config(private(mechanism))) is mechanism
    assert bool(mechanism.unit) == mechanism.is_private


def test_a_budget_is_asked_for_where_something_is_protected(mechanism: Mechanism) -> None:
    content = override("privacy.mode", mechanism.name)
    if mechanism.is_private:
        with pytest.raises(InputError, match=rf"privacy\.target_epsilon.*mode {mechanism.name}"):
            load_config(content)
    else:
        assert load_config(content).privacy.mode == mechanism.name


def test_clients_plan_the_noise_that_they_add(mechanism: Mechanism) -> None:
    plan = mechanism.plan(load_config(private(mechanism)), 100)
    assert (plan is not None) == (mechanism.noise_by == "client")
    assert plan is None or (plan.noise_multiplier > 0 and plan.ceiling == 8.0)


def test_the_server_plans_the_noise_that_it_adds(mechanism: Mechanism) -> None:
    plan = mechanism.server_plan(load_config(private(mechanism)), 100)
    assert (plan is not None) == (mechanism.noise_by == "server")
    assert plan is None or plan.noise_multiplier > 0


def test_a_reply_says_what_its_client_spent(mechanism: Mechanism) -> None:
    assert bool(mechanism.reply_metrics) == (mechanism.noise_by == "client")
    spent = dict.fromkeys(mechanism.reply_metrics, 0.5)
    read = read_metrics(MetricRecord({"num-examples": 3, "steps": 2, **spent, "other": 1.0}), mechanism=mechanism)
    assert dict(read) == {"num-examples": 3, "steps": 2, **spent}
    for name in mechanism.reply_metrics:
        for wrong in ({}, {name: float("nan")}, {name: -1.0}):
            said = MetricRecord(
                {"num-examples": 3, "steps": 2, **{k: v for k, v in spent.items() if k != name}, **wrong}
            )
            with pytest.raises(ReplyError, match=name):
                read_metrics(said, mechanism=mechanism)


def test_a_key_that_clipping_of_examples_replaces_is_noted(mechanism: Mechanism) -> None:
    content = private(mechanism) | {"client": {"max_grad_norm": 1.0}}
    noted = any(note.startswith("client.max_grad_norm ") for note in unused_keys(load_config(content)))
    assert noted == mechanism.clips_examples


def test_other_modes_are_refused() -> None:
    with pytest.raises(InputError, match=r"privacy\.mode = 'person': should be .*'none'"):
        load_config(override("privacy.mode", "person"))
