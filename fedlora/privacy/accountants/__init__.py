"""Privacy accountants, one file each: they compute epsilon from a history of noisy steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

from fedlora.registry import ACCOUNTANTS

History = tuple[tuple[float, float, int], ...]
"""Poisson-sampled Gaussian steps: (noise multiplier, sample rate, number)."""


class Accountant(ABC):
    """Computes epsilon from a history of steps. Stateless.

    Attributes
    ----------
    name : str
        ``privacy.accountant``, and the name of the file.
    is_bound : bool
        Whether epsilon is an upper bound. A data owner's policy only takes accountants that give one.
    kind : str
        Which accountant of Google's dp-accounting computes as it does: ``rdp`` or ``pld``.
    note : str
        Warning for users who choose it; "" for none.
    """

    name: ClassVar[str]
    is_bound: ClassVar[bool]
    kind: ClassVar[str] = "pld"
    note: ClassVar[str] = ""

    @abstractmethod
    def epsilon(self, delta: float, history: History) -> float:
        """Return epsilon at ``delta`` of all steps of a history together.

        This must return within a few seconds for every history, since steps that were taken must be counted: infinity
        where the accountant has no other answer.

        Parameters
        ----------
        delta : float
        history : tuple of (float, float, int)
            Not empty; noise multipliers lie between ``MIN_NOISE`` and ten times ``MAX_NOISE``
            (:mod:`fedlora.config`).
        """

    def for_calibration(self, epsilon: float) -> str:
        """Return the name of the accountant that calibrates noise for ``epsilon``: its own, unless it is too coarse."""
        return self.name

    def first_guesses(
        self, epsilon: float, total: Callable[[float], float], sigma_by: Callable[[str, float], float]
    ) -> Iterable[float]:
        """Yield noise multipliers to try before bisecting, for accountants that take long; none by default.

        Parameters
        ----------
        epsilon : float
            The target.
        total : callable (sigma) -> float
            Epsilon, by this accountant, of the steps to calibrate with noise ``sigma`` and of those before them.
        sigma_by : callable (accountant, tolerance) -> float
            The noise multiplier that another accountant finds, to a relative tolerance; raises an InputError if it
            finds none.
        """
        return ()


def get_accountant(name: str) -> Accountant:
    """Return the accountant of a name.

    Raises
    ------
    InputError
        If there is none; it lists the names.
    """
    found: Accountant = ACCOUNTANTS.made(name)
    return found
