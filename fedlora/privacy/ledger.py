"""The ledger: everything that a client ever released, from which its epsilon is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.errors import BudgetError
from fedlora.privacy.accountants import Steps, group_of, steps_of
from fedlora.privacy.calibration import PrivacyPlan, spent_epsilon


class Ledger:
    """History of one client's noisy steps, across rounds and restarts.

    Parameters
    ----------
    accountant : str
        ``privacy.accountant``.
    delta : float
    history : list of tuple, optional
        (noise multiplier, sample rate, steps), as accountants take it, and where a unit has several examples in a step
        their number.

    Notes
    -----
    In simulation the ledger is charged when a client's result leaves the training code, never before: a client that
    drops out is charged only for what it released. It lives in Flower's ``context.state`` as plain lists. A real node
    charges its owner's ledger before every step (:mod:`fedlora.node.node_ledger`).
    """

    def __init__(self, accountant: str, delta: float, history: Sequence[Steps] | None = None) -> None:
        self.accountant, self.delta = accountant, delta
        self.history = list(history or [])

    @property
    def steps(self) -> int:
        """All steps charged so far."""
        return sum(entry[2] for entry in self.history)

    def epsilon(self) -> float:
        """Epsilon at the ledger's delta of all that was charged; infinite where a step had no noise."""
        return spent_epsilon(self.accountant, self.delta, tuple(self.history))

    def check(self, plan: PrivacyPlan, steps: int, start: bool = False) -> None:
        """Refuse steps (and a start from the client's examples) that would pass the client's ceiling.

        Raises
        ------
        BudgetError
            Saying what is spent and what the ceiling is.
        """
        if plan.ceiling is None:
            return
        after = spent_epsilon(self.accountant, self.delta, tuple(self._extended(plan, steps, start)))
        if after > plan.ceiling:
            raise BudgetError(
                f"{steps} more steps would bring epsilon from {self.epsilon():.4g} to {after:.4g}, "
                f"above the ceiling of {plan.ceiling:.4g}",
                left=max(0.0, plan.ceiling - self.epsilon()),
            )

    def charge(self, plan: PrivacyPlan, steps: int, start: bool = False) -> None:
        """Add steps that were released, and the start if it was made from the client's examples."""
        self.history = self._extended(plan, steps, start)

    def _extended(self, plan: PrivacyPlan, steps: int, start: bool) -> list[Steps]:
        history = [*self.history, *(plan.start if start else ())]
        if history and history[-1] == plan.charged(history[-1][2]):
            history[-1] = plan.charged(history[-1][2] + steps)
        elif steps:
            history.append(plan.charged(steps))
        return history

    def to_record(self) -> dict[str, Any]:
        """Return the ledger as scalars and lists, for a Flower ConfigRecord."""
        groups = [group_of(entry) for entry in self.history]
        return {
            "accountant": self.accountant,
            "delta": self.delta,
            "noise-multipliers": [float(entry[0]) for entry in self.history],
            "sample-rates": [float(entry[1]) for entry in self.history],
            "steps": [int(entry[2]) for entry in self.history],
            **({"groups": groups} if any(group > 1 for group in groups) else {}),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Ledger:
        """Rebuild a ledger from :meth:`to_record`."""
        columns = [record[key] for key in ("noise-multipliers", "sample-rates", "steps")]
        groups = record.get("groups") or [1] * len(columns[0])
        history = [steps_of(*entry) for entry in zip(*columns, groups, strict=True)]
        return cls(str(record["accountant"]), float(record["delta"]), history)
