"""What a step releases of a unit with several examples, each of which is sampled by itself.

Of a unit's k examples j ~ Binomial(k, q) are in a step, whose clipped gradients add up to j clipping norms at most. The
step is dominated by the pair P = sum over j of P(j) N(j, sigma^2) and Q = N(0, sigma^2), whatever the examples are and
however later steps depend on earlier ones (Choquette-Choo et al. 2023, arXiv 2310.15526, on mixtures of Gaussians;
Charles et al. 2024, arXiv 2407.07737). Outcomes x are in units of sigma here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from opacus.accountants.analysis.prv import (
    Domain,
    TruncatedPrivacyRandomVariable,
    compose_heterogeneous,
    discretize,
)
from scipy.special import logsumexp, ndtr
from scipy.stats import binom

_TAIL = 12.0
"""Beyond so many standard deviations an integral has nothing left that a double would show."""
_REACH = 1000.0
"""How far out an integral is taken; orders whose mass lies beyond count as infinite."""
_FINE = 1 / 32
"""Spacing of the outcomes between which a loss is inverted by Newton's method."""


class GroupStep:
    """The pair (P, Q) of a step.

    Parameters
    ----------
    sigma : float
        Noise multiplier.
    rate : float
        q.
    group : int
        k.
    """

    def __init__(self, sigma: float, rate: float, group: int) -> None:
        self.shifts = np.arange(group + 1) / sigma
        self.log_weights = binom.logpmf(np.arange(group + 1), group, rate)
        self._step = min(0.25, sigma / 2)

    def loss(self, x: np.ndarray) -> np.ndarray:
        """Return log P(x) / Q(x), which increases in x and is convex."""
        found = np.full(x.shape, -np.inf)
        for weight, shift in zip(self.log_weights, self.shifts, strict=True):
            found = np.logaddexp(found, weight + shift * x - shift**2 / 2)
        return found

    def divergences(self, orders: np.ndarray) -> np.ndarray:
        """Return the Renyi divergences of P from Q and of Q from P, the larger of the two at each order.

        They are integrals by the trapezoidal rule, exact to rounding. The integrand of the first is no narrower than a
        normal density of deviation 1, that of the second, of order a, than one of deviation 1 / sqrt(a).
        """
        found = np.full(len(orders), np.inf)
        fit = orders * self.shifts[-1] <= _REACH
        if not fit.any():
            return found
        largest = float(orders[fit].max())
        near = self.log_weights - self.shifts**2 / 2
        mean = float(np.exp(near - logsumexp(near)) @ self.shifts)  # P's mean shift, seen from 0
        found[fit] = np.maximum(
            self._divergences(orders[fit], -_TAIL, largest * self.shifts[-1] + _TAIL, self._step, 1),
            self._divergences(orders[fit], -_TAIL - (largest - 1) * mean, _TAIL, self._step / 8, 0),
        )
        return found

    def _divergences(self, orders: np.ndarray, low: float, high: float, step: float, other: int) -> np.ndarray:
        """Integrate Q (P / Q)^a, or with ``other`` 0 Q (P / Q)^(1 - a)."""
        x = np.arange(low, high, step)
        loss, base = self.loss(x), -(x**2) / 2 + math.log(step / math.sqrt(2 * math.pi))
        powers = orders if other else 1 - orders
        log_a = np.array([logsumexp(power * loss + base) for power in powers])
        found: np.ndarray = np.maximum(log_a, 0) / (orders - 1)
        return found


class GroupLoss:
    """The privacy loss of a step as a random variable, for Opacus' numerical composition (Gopi et al. 2021).

    Parameters
    ----------
    step : GroupStep
    removes : bool
        log P / Q of an outcome of P; else log Q / P of an outcome of Q.
    """

    def __init__(self, step: GroupStep, removes: bool) -> None:
        self._step, self._removes = step, removes
        self._weights = np.exp(step.log_weights)
        self._x = np.arange(-40.0, step.shifts[-1] + 40, _FINE)
        self._t = step.loss(self._x)

    def cdf(self, t: np.ndarray | float) -> np.ndarray:
        """Return the probability of a loss of at most t."""
        t = np.asarray(t, float)
        if self._removes:
            x = self._outcome(t)
            found: np.ndarray = ndtr(x[..., None] - self._step.shifts) @ self._weights
        else:
            found = ndtr(-self._outcome(-t))
        return found

    def _outcome(self, t: np.ndarray) -> np.ndarray:
        """Return the outcome x whose log P / Q is t; infinite where no outcome that happens has it."""
        near = np.interp(t, self._t, self._x)
        terms = self._step.log_weights + near[..., None] * self._step.shifts - self._step.shifts**2 / 2
        loss = logsumexp(terms, axis=-1)
        slope = np.maximum(np.exp(terms - loss[..., None]) @ self._step.shifts, 1e-300)
        x = near - np.clip((loss - t) / slope, -_FINE, _FINE)
        return np.where(t < self._t[0], -np.inf, np.where(t > self._t[-1], np.inf, x))


def composed_epsilon(
    delta: float, steps: Sequence[tuple[GroupStep, int]], removes: bool, reach: float, error: float
) -> float:
    """Return an upper bound of epsilon of steps, so many of each, on a grid of losses up to ``reach``.

    Raises
    ------
    RuntimeError, ValueError
        If the grid is too coarse, or too long for delta.
    """
    slack, counts = delta / 1000, [count for _, count in steps]
    mesh = error / math.sqrt(sum(counts) * math.log(12 / slack) / 2)
    domain = Domain.create_aligned(-reach, reach, mesh)
    losses = [TruncatedPrivacyRandomVariable(GroupLoss(s, removes), domain.t_min, domain.t_max) for s, _ in steps]
    composed = compose_heterogeneous([discretize(loss, domain) for loss in losses], counts)
    return float(composed.compute_epsilon(delta, slack, error)[2])
