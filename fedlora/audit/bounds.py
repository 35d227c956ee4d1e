"""What guesses prove about epsilon: lower bounds that hold with a confidence, each with what it assumes.

A right guess more than a private mechanism allows is evidence. Three kinds are told apart by how they came about:

- :class:`Trials`: independent runs, with and without a canary. Nothing else is assumed.
- :class:`Releases`: single noisy sums, with and without a canary; a whole run is their composition.
- :class:`OneRun`: many canaries in one run, each in or out by a coin.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.stats import beta, binom, norm

from fedlora.errors import InputError
from fedlora.privacy.accountants.gdp import gaussian_epsilon

_CHANCES = (0.9, 0.7, 0.5, 0.3, 0.1)
MAX_EPSILON = 100.0
"""No number of guesses that a computer makes proves more."""


class Evidence(ABC):
    """The guesses of one attack.

    Attributes
    ----------
    estimator : str
        How the bound is made.
    assumes : str
        What has to hold for it.
    """

    estimator: ClassVar[str]
    assumes: ClassVar[str]

    @abstractmethod
    def bound(self, delta: float, confidence: float) -> float:
        """Return an epsilon that the true one, at this delta, lies below with probability 1 - confidence at most."""


@dataclass(frozen=True)
class Trials(Evidence):
    """Independent trials of a mechanism, of which some had the canary.

    Attributes
    ----------
    alarms, without : int
        Of so many trials without the canary, so many were taken for one with it.
    misses, held : int
        Of so many trials with the canary, so many were taken for one without it.
    """

    alarms: int
    without: int
    misses: int
    held: int

    estimator = "Clopper-Pearson on false alarms and misses"
    assumes = "independent trials"

    def rates(self, confidence: float) -> tuple[float, float]:
        """Return upper bounds of the rates of false alarms and misses, both together with this confidence."""
        level = 1 - (1 - confidence) / 2
        return upper_rate(self.alarms, self.without, level), upper_rate(self.misses, self.held, level)

    def bound(self, delta: float, confidence: float) -> float:
        """Use that an (epsilon, delta) mechanism has 1 - misses <= exp(epsilon) alarms + delta, and vice versa."""
        alarms, misses = self.rates(confidence)
        best = max(_log_ratio(1 - misses - delta, alarms), _log_ratio(1 - alarms - delta, misses))
        return min(max(0.0, best), MAX_EPSILON)


@dataclass(frozen=True)
class Releases(Trials):
    """Single noisy sums, of which some had the canary; what the noise is to the canary bounds a whole run.

    The rates prove that one sum tells the two apart at least as well as two Gaussians ``mu`` standard deviations apart
    (Nasr et al. 2023, arXiv 2302.07956). A run of ``steps`` such sums, into each of which the canary comes with
    probability ``sample_rate``, then has the epsilon of their composition. Of a canary of a
    ``group`` of examples each comes with that probability; ``mu`` is the distance where all of them came.

    Attributes
    ----------
    sample_rate : float
    steps : int
    group : int
    """

    sample_rate: float = 1.0
    steps: int = 1
    group: int = 1

    estimator = "Gaussian DP of single noisy sums, composed"
    assumes = "Gaussian noise, drawn anew for each sum; Poisson sampling by the plan's rate"

    def mu(self, confidence: float) -> float:
        """Return a lower bound of the distance of the two Gaussians, in standard deviations; at least 0."""
        return max(0.0, float(-sum(norm.ppf(rate) for rate in self.rates(confidence))))

    def bound(self, delta: float, confidence: float) -> float:
        """Compose as many Gaussians of this distance as the run has steps.

        Of a group j examples come or more with probability P[Binomial >= j]. Their sum is no nearer to one without the
        canary than that of j examples, and what comes with fewer than j no nearer than nothing: whatever threshold
        tells the canary of j examples, which come together or not at all, tells this one as well. Examples are alike.
        """
        mu = self.mu(confidence)
        proved = (composed_epsilon(share * mu, rate, self.steps, delta) for share, rate in self._draws())
        return min(max(proved), MAX_EPSILON)

    def _draws(self) -> list[tuple[float, float]]:
        """Return shares of the group, each with the probability that so many of its examples come or more."""
        if self.group == 1:
            return [(1.0, self.sample_rate)]
        numbers = {1, *binom.isf(_CHANCES, self.group, self.sample_rate).astype(int).tolist()} - {0}
        return [(j / self.group, float(binom.sf(j - 1, self.group, self.sample_rate))) for j in sorted(numbers)]


@dataclass(frozen=True)
class OneRun(Evidence):
    """Guesses about many canaries of one run (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846).

    Attributes
    ----------
    canaries : int
        m; each was in the run with probability 1/2, independently.
    guesses, right : int
        How many of the canaries were guessed about, and how many of the guesses are right.
    """

    canaries: int
    guesses: int
    right: int

    estimator = "one run (arXiv 2305.08846)"
    assumes = "a coin of its own for each canary"

    def p_value(self, epsilon: float, delta: float) -> float:
        """Return how likely as many right guesses are, at most, under (epsilon, delta)-DP (corollary 5.4).

        Were delta 0, they would be at most a binomial number with chance e^eps / (1 + e^eps); delta adds at most
        2 m delta max_i P[right > binomial >= right - i] / i.
        """
        chance = 1 / (1 + math.exp(-epsilon))
        fewer = binom.pmf(np.arange(self.right - 1, -1, -1), self.guesses, chance)
        alpha = float((np.cumsum(fewer) / np.arange(1, self.right + 1)).max(initial=0.0))
        return min(1.0, float(binom.sf(self.right - 1, self.guesses, chance)) + 2 * self.canaries * delta * alpha)

    def bound(self, delta: float, confidence: float) -> float:
        """Return the largest epsilon whose p-value is below 1 - confidence."""
        low, high = 0.0, MAX_EPSILON
        if self.p_value(low, delta) >= 1 - confidence:
            return 0.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (middle, high) if self.p_value(middle, delta) < 1 - confidence else (low, middle)
        return low


def upper_rate(found: int, trials: int, confidence: float) -> float:
    """Bound a rate from above, by Clopper and Pearson, of which ``found`` of ``trials`` were seen."""
    return 1.0 if found >= trials else float(beta.ppf(confidence, found + 1, trials - found))


def composed_epsilon(mu: float, sample_rate: float, steps: int, delta: float) -> float:
    """Epsilon of ``steps`` Poisson-sampled Gaussian sums; never above the true one.

    Parameters
    ----------
    mu : float
        The canary's part of a sum, in standard deviations of the noise.
    sample_rate : float
    steps : int
    delta : float

    Raises
    ------
    InputError
        If dp-accounting is needed, for a sample rate below 1, and not installed.
    """
    if mu <= 0:
        return 0.0
    if sample_rate == 1:
        return gaussian_epsilon(mu * math.sqrt(steps), delta)
    try:
        from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
    except ImportError:
        remedy = "is needed to audit sampled steps; install it: pip install 'fedlora[accounting]'"
        raise InputError("dp-accounting", None, remedy) from None
    one = from_gaussian_mechanism(
        1 / mu,
        value_discretization_interval=min(1e-3, 0.02 / steps),  # of which the error is at most steps times as much
        sampling_prob=sample_rate,
        pessimistic_estimate=False,
        use_connect_dots=False,
    )
    return float(one.self_compose(steps).get_epsilon_for_delta(delta))


def best_threshold(without: np.ndarray, held: np.ndarray, counts: tuple[int, int], delta: float) -> float:
    """Choose the threshold by which trials are best told apart, from scores that the auditor simulated.

    Parameters
    ----------
    without, held : ndarray
        Simulated scores without and with the canary.
    counts : (int, int)
        How many real trials of each there will be.
    delta : float
    """
    candidates = np.unique(np.quantile(np.concatenate([without, held]), np.linspace(0, 1, 401)[1:-1]))
    alarms = 1 - np.searchsorted(np.sort(without), candidates, side="right") / len(without)
    misses = np.searchsorted(np.sort(held), candidates, side="right") / len(held)
    first, second = counts
    proved = [
        Trials(round(a * first), first, round(b * second), second).bound(delta, 0.95)
        for a, b in zip(alarms, misses, strict=True)
    ]
    return float(candidates[int(np.argmax(proved))])


def _log_ratio(above: float, below: float) -> float:
    return math.log(above / below) if above > 0 and below > 0 else 0.0
