"""Privacy accountants, one file each: what epsilon follows from steps with so much noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

from fedlora.registry import ACCOUNTANTS

History = tuple[tuple[float, float, int], ...]
"""Poisson-sampled Gaussian steps: (noise multiplier, sample rate, number)."""


class Accountant(ABC):
    """Reads epsilon from a history of steps. Stateless.

    Attributes
    ----------
    name : str
        ``privacy.accountant``, and the name of the file.
    is_bound : bool
        Whether epsilon is an upper bound, which it must be for a data owner to count by it.
    note : str
        What to tell who chooses it; "" for nothing.
    """

    name: ClassVar[str]
    is_bound: ClassVar[bool]
    note: ClassVar[str] = ""

    @abstractmethod
    def epsilon(self, delta: float, history: History) -> float:
        """Return epsilon at ``delta`` of all steps of a history together.

        Every question must have an answer, after a few seconds at most, since steps that were taken must be counted;
        it is infinite where there is no other.

        Parameters
        ----------
        delta : float
        history : tuple of (float, float, int)
            Not empty; noise multipliers lie between ``MIN_NOISE`` and ten times ``MAX_NOISE``
            (:mod:`fedlora.config`).
        """

    def for_calibration(self, epsilon: float) -> str:
        """Name the accountant by which noise for ``epsilon`` is found: this one, unless it is too coarse."""
        return self.name

    def first_guesses(
        self, epsilon: float, total: Callable[[float], float], sigma_by: Callable[[str, float], float]
    ) -> Iterable[float]:
        """Yield noise multipliers that a calibration tries before it bisects; for accountants that take long.

        Parameters
        ----------
        epsilon : float
            The target.
        total : callable (sigma) -> float
            Epsilon by this accountant of the steps to calibrate with noise ``sigma``, and those before them.
        sigma_by : callable (accountant, tolerance) -> float
            The noise multiplier that another accountant finds, to a relative tolerance; raises an InputError if it
            finds none.
        """
        return ()


def get_accountant(name: str) -> Accountant:
    """Return the accountant of a name; an InputError says what there is where there is none."""
    found: Accountant = ACCOUNTANTS.made(name)
    return found
