"""Gaussian differential privacy (Dong, Roth, Su 2019, arXiv 1905.02383): an approximation and no bound."""

from __future__ import annotations

import math

import numpy as np
from opacus.accountants.analysis import gdp
from scipy.optimize import brentq
from scipy.special import log_ndtr
from scipy.stats import binom

from fedlora.privacy.accountants import Accountant, GroupHistory, History


class Gdp(Accountant):
    """The central limit theorem for many steps. Steps with different noise compose by mu^2 = sum mu_i^2.

    Opacus' own accountant only reads the last entry of a history.
    """

    name = "gdp"
    is_bound = False
    counts_groups = True
    note = "privacy.accountant = gdp can give several times too small an epsilon; rdp and prv are bounds"

    def epsilon(self, delta: float, history: History) -> float:
        """Solve for the epsilon at which the composition has this delta."""
        return gaussian_epsilon(math.sqrt(sum(q**2 * n * float(np.expm1(sigma**-2)) for sigma, q, n in history)), delta)

    def group_epsilon(self, delta: float, history: GroupHistory) -> float:
        """Do so with the chi-squared divergences of mixtures of Gaussians."""
        return gaussian_epsilon(math.sqrt(sum(n * _chi_squared(sigma, q, k) for sigma, q, n, k in history)), delta)


def _chi_squared(sigma: float, q: float, group: int) -> float:
    """Return E exp(i j / sigma^2) - 1 over independent i, j ~ Binomial(group, q)."""
    j = np.arange(group + 1)
    weights = binom.pmf(j, group, q)
    found = float(weights @ np.expm1(np.outer(j, j) / sigma**2) @ weights)
    return math.inf if math.isnan(found) else found  # a weight of 0 times an overflow


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon, at this delta, of a mechanism that tells no more than one draw of N(0, 1) or N(mu, 1); exact."""
    if math.isinf(mu) or gdp.delta_eps_mu(eps=0, mu=mu) <= delta:
        return math.inf if math.isinf(mu) else 0.0

    def excess(epsilon: float) -> float:
        """Return log(delta at epsilon) - log(delta); the deltas themselves could underflow."""
        first, second = log_ndtr(-epsilon / mu + mu / 2), log_ndtr(-epsilon / mu - mu / 2)
        return float(first + np.log(-np.expm1(min(epsilon + second - first, -1e-300))) - math.log(delta))

    most = mu * (mu / 2 + math.sqrt(-2 * math.log(delta)))
    # Of a huge mu, doubles keep too few digits to solve for more than this.
    return most if excess(most) > 0 else float(brentq(excess, 0.0, most))
