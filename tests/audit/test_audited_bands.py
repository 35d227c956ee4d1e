"""An auditor of noise that is correlated over rounds: it finds nothing in a sound server, and its faults in others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.audit import clients as audited
from fedlora.audit.clients import observe_clients
from fedlora.audit.releases import Observations
from fedlora.config import Config, load_config
from fedlora.privacy.banded import BandedNoise
from fedlora.privacy.calibration import spent_epsilon
from fedlora.strategies.client_noise import ClientNoise
from tests.configs import override

Patch = pytest.MonkeyPatch
BANDS, ROUNDS, DELTA, TRIALS = 3, 7, 1e-3, 600
SHAPES = {"a": (6, 5), "b": (10,)}


def config(fraction: float = 1 / BANDS) -> Config:
    content = override("privacy", {"mode": "client", "noise_multiplier": 0.6, "target_delta": DELTA, "bands": BANDS})
    content["run"] = {"rounds": ROUNDS}
    content["server"] = {"sampling": "poisson", "fraction_train": fraction}
    return load_config(content)


def bounds(seen: Observations) -> dict[str, float]:
    evidence = seen.evidence(DELTA)
    return {name: one.bound(DELTA, 1 - 0.05 / len(evidence)) for name, one in evidence.items()}


def failed(seen: Observations) -> set[str]:
    return {check.name for check in seen.checks() if not check.passed}


@pytest.mark.parametrize("fraction", [1 / BANDS, 0.2])
def test_a_sound_server_keeps_its_claim_and_the_bound_comes_near_it(fraction: float) -> None:
    chosen = config(fraction)
    seen = observe_clients(chosen, 30, SHAPES, TRIALS)
    claimed = spent_epsilon("rdp", DELTA, ((0.6, min(1.0, fraction * BANDS), -(-ROUNDS // BANDS)),))
    assert failed(seen) == set()
    assert max(bounds(seen).values()) <= claimed
    # Of two whole turns, and 600 trials; independent noise of this size is found out as well.
    assert bounds(seen)["each sum"] > 0.4 * claimed


def test_a_turn_is_a_sum_of_its_own_with_the_whole_noise() -> None:
    """Scores are those of a Gaussian mechanism: 1 with the canary, and of the plan's deviation around it."""
    seen = observe_clients(config(), 30, SHAPES, TRIALS)
    scores, held = (np.concatenate(parts) for parts in (seen.groups["whole"].scores, seen.groups["whole"].held))
    assert len(scores) == TRIALS * (ROUNDS // BANDS)
    for there in (False, True):
        found = scores[held == there]
        assert found.mean() == pytest.approx(float(there), abs=5 * 0.6 / np.sqrt(len(found)))
        assert found.std() == pytest.approx(0.6, rel=5 / np.sqrt(2 * len(found)))


def half_the_noise(patch: Patch) -> None:
    draw = ClientNoise._normal
    patch.setattr(ClientNoise, "_normal", lambda self, count: draw(self, count) / 2)


def noise_that_is_not_correlated(patch: Patch) -> None:
    patch.setattr(BandedNoise, "next", lambda self, normal: normal)


def clients_in_every_round(patch: Patch) -> None:
    patch.setattr(audited, "whose_turn", lambda present, turn, groups: sorted(present))


def a_memory_that_is_lost(patch: Patch) -> None:
    """As of a server that a resumed run begins anew."""
    following = BandedNoise.next

    def forgetful(self: BandedNoise, normal: torch.Tensor) -> Any:
        self.earlier = []
        return following(self, normal)

    patch.setattr(BandedNoise, "next", forgetful)


@pytest.mark.parametrize(
    "fault", [half_the_noise, noise_that_is_not_correlated, clients_in_every_round, a_memory_that_is_lost]
)
def test_a_fault_is_found(monkeypatch: Patch, fault: Callable[[Patch], None]) -> None:
    fault(monkeypatch)
    assert "noise: update" in failed(observe_clients(config(), 30, SHAPES, TRIALS))
