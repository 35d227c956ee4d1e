"""Privacy accountants, one file each: they compute epsilon from a history of noisy steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

from fedlora.registry import ACCOUNTANTS

History = tuple[tuple[float, float, int], ...]
"""Poisson-sampled Gaussian steps: (noise multiplier, sample rate, number)."""

GroupHistory = tuple[tuple[float, float, int, int], ...]
"""Steps of which a unit has up to k examples, each sampled by itself: (noise multiplier, sample rate, number, k)."""

Steps = tuple[float, float, int] | tuple[float, float, int, int]
"""What a ledger holds: an entry of either history."""


def steps_of(noise_multiplier: float, sample_rate: float, steps: int, group: int = 1) -> Steps:
    """Return a ledger's entry; one of a single example, or of a unit that is sampled as a whole, has three numbers."""
    entry = noise_multiplier, sample_rate, steps
    return entry if group == 1 else (*entry, group)


def group_of(entry: Steps) -> int:
    """Return how many examples of a unit can be in a step of an entry."""
    return entry[3] if len(entry) == 4 else 1


class Accountant(ABC):
    """Computes epsilon from a history of steps. Stateless.

    Attributes
    ----------
    name : str
        ``privacy.accountant``, and the name of the file.
    is_bound : bool
        Whether epsilon is an upper bound. A data owner's policy accepts only such accountants.
    kind : str
        The accountant of Google's dp-accounting of the same kind: ``rdp`` or ``pld``.
    note : str
        Warning for users who choose it; "" for none.
    counts_groups : bool
        Whether :meth:`group_epsilon` has an answer.
    """

    name: ClassVar[str]
    is_bound: ClassVar[bool]
    kind: ClassVar[str] = "pld"
    note: ClassVar[str] = ""
    counts_groups: ClassVar[bool] = False

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

    def group_epsilon(self, delta: float, history: GroupHistory) -> float:
        """Return epsilon of steps into which up to k examples of one unit enter, each with the sample rate.

        The unit's part of a step's sum then has a norm of at most j clipping norms, j ~ Binomial(k, sample rate): a
        mixture of Gaussians (Choquette-Choo et al. 2023, arXiv 2310.15526; Charles et al. 2024, arXiv 2407.07737).
        Infinite unless an accountant says otherwise.
        """
        return math.inf

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
