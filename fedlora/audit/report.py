"""The result of an audit: what is claimed, what is proved, and what was checked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fedlora.audit.releases import Check


@dataclass(frozen=True)
class Attack:
    """What one attack proves.

    Attributes
    ----------
    name : str
    epsilon : float
        A lower bound.
    estimator, assumes : str
        How it is made, and what has to hold for it.
    counts : dict of str to int
        The guesses.
    """

    name: str
    epsilon: float
    estimator: str
    assumes: str
    counts: dict[str, float]


@dataclass(frozen=True)
class Audit:
    """An audit's result.

    Attributes
    ----------
    unit : str
        What is protected.
    epsilon, delta : float
        Claimed; epsilon is infinite without privacy.
    confidence : float
        With which the bounds of all attacks hold together.
    canaries : int
    attacks : list of Attack
    checks : list of Check
    """

    unit: str
    epsilon: float
    delta: float
    confidence: float
    canaries: int
    attacks: list[Attack]
    checks: list[Check]

    @property
    def lower_bound(self) -> float:
        """The most that an attack proves."""
        return max((attack.epsilon for attack in self.attacks), default=0.0)

    @property
    def faults(self) -> list[str]:
        """What speaks against the claim; empty if nothing does."""
        found = [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]
        if self.lower_bound > self.epsilon:
            found.insert(0, f"epsilon is {self.lower_bound:.4g} at least, and {self.epsilon:.4g} is claimed")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible values; what is infinite is null."""
        best = max(self.attacks, key=lambda attack: attack.epsilon, default=None)
        return {
            "claimed": {"epsilon": None if math.isinf(self.epsilon) else self.epsilon, "delta": self.delta},
            "lower_bound": {
                "epsilon": self.lower_bound,
                "confidence": self.confidence,
                "attack": best.name if best else None,
                "estimator": best.estimator if best else None,
                "assumes": best.assumes if best else None,
            },
            "canaries": self.canaries,
            "unit": self.unit,
            "holds": not self.faults,
            "attacks": [asdict(attack) for attack in self.attacks],
            "checks": [asdict(check) for check in self.checks],
        }
