"""An audit of a config, from start to end: the function behind ``fedlora audit``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.audit.bounds import Evidence
from fedlora.audit.clients import observe_clients
from fedlora.audit.examples import observe_examples
from fedlora.audit.inputs import SHADOWS, attack_inputs
from fedlora.audit.releases import Check, Observations
from fedlora.audit.report import Attack, Audit
from fedlora.clients.resources import client_data
from fedlora.config import NODES, Config, load_config
from fedlora.data.sources import with_absolute_paths
from fedlora.data.tokens import FederatedData
from fedlora.errors import InputError
from fedlora.privacy.calibration import PrivacyPlan, ServerPlan, spent_epsilon
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.strategies.base import get_strategy
from fedlora.strategies.server_app import resolve

CONFIDENCE = 0.95
CANARIES = 1000
FEWEST = 20
"""With fewer canaries nothing is proved."""


def audit(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    canaries: int = CANARIES,
    releases: bool = True,
    inputs: bool = True,
    shadows: int = SHADOWS,
) -> Audit:
    """Attack a run's mechanism, and bound its epsilon from below.

    Parameters
    ----------
    config : str, Path or Mapping
        A TOML file, TOML text, or its parsed content.
    overrides : Mapping, optional
        ``section.key`` to value, as ``--set`` on the command line.
    canaries : int
        Of the white-box attack, half of whose trials hold one; and of the attack on the final model, at most.
    releases : bool
        Whether to attack the noisy sums that a run releases, where it adds noise, and to check them.
    inputs : bool
        Whether to train a whole run with mislabelled canaries, too, and attack its final model.
    shadows : int
        Adapters that the membership test compares with; 0 leaves it out.

    Returns
    -------
    Audit

    Raises
    ------
    InputError
        If something that the user gave is wrong, or the config leaves nothing to attack.
    """
    if canaries < FEWEST:
        raise InputError("--canaries", canaries, f"proves nothing; give at least {FEWEST}")
    chosen = with_absolute_paths(resolve(load_config(config, overrides)))
    if chosen.data.name == NODES:
        raise InputError("data.name", NODES, "means examples on real nodes; name the examples to audit on")
    data = client_data(chosen)
    plan, claimed = _claim(chosen, data)
    noisy = releases and plan is not None and plan.noise_multiplier > 0
    seen = _observe(chosen, data, plan, canaries) if plan is not None and noisy else None
    delta = chosen.privacy.target_delta
    evidence: dict[str, Evidence] = {} if seen is None else seen.evidence(delta)
    checks: list[Check] = [] if seen is None else seen.checks()
    count = 0 if seen is None else canaries
    if inputs:
        found, used = attack_inputs(chosen, canaries, shadows)
        evidence, count = evidence | found, max(count, used)
    if not evidence:
        remedy = "adds no noise that could be audited; attack the final model (leave --no-inputs out)"
        raise InputError("privacy.mode", chosen.privacy.mode, remedy)
    each = 1 - (1 - CONFIDENCE) / len(evidence)
    attacks = [
        Attack(name, one.bound(delta, each), one.estimator, one.assumes, asdict(one))  # type: ignore[call-overload]
        for name, one in evidence.items()
    ]
    unit = mechanism_of(chosen).protects(chosen) or "one example of one client"
    return Audit(unit, claimed, delta, CONFIDENCE, count, attacks, checks)


def _claim(config: Config, data: FederatedData) -> tuple[PrivacyPlan | ServerPlan | None, float]:
    """Return the plan that is audited, and the epsilon of all its steps; of the smallest client, which samples most."""
    mechanism, privacy = mechanism_of(config), config.privacy
    if mechanism.noise_by == "server":
        server = mechanism.server_plan(config, len(data.partition))
        assert server is not None
        releases = (server.noise_multiplier, server.sample_rate, server.charged(server.releases))
        return server, spent_epsilon(privacy.accountant, privacy.target_delta, (releases,))
    sizes = data.drawn_sizes(privacy)
    smallest = int(np.argmin(sizes))
    plan = mechanism.plan(config, sizes[smallest], data.units_of(smallest, privacy))
    if plan is None:
        return None, math.inf
    charged = (*plan.start, plan.charged(plan.steps))
    return plan, spent_epsilon(privacy.accountant, privacy.target_delta, charged)


def _observe(config: Config, data: FederatedData, plan: PrivacyPlan | ServerPlan, trials: int) -> Observations:
    strategy = get_strategy(config.method.name)(config)
    strategy.know(strategy.server_model(data, "meta"))
    strategy.enter(1, 1)
    if isinstance(plan, PrivacyPlan):
        examples = min(data.drawn_sizes(config.privacy))
        return observe_examples(config, partial(strategy.client_settings, 0), plan, examples, trials)
    return observe_clients(config, len(data.partition), dict(strategy.client_shapes(0)), trials)
