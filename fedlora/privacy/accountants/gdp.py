"""Gaussian differential privacy (Dong, Roth, Su 2019, arXiv 1905.02383): an approximation and no bound."""

from __future__ import annotations

import math

import numpy as np
from opacus.accountants.analysis import gdp
from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedlora.privacy.accountants import Accountant, History


class Gdp(Accountant):
    """The central limit theorem for many steps. Steps with different noise compose by mu^2 = sum mu_i^2.

    Opacus' own accountant only reads the last entry of a history.
    """

    name = "gdp"
    is_bound = False
    note = "privacy.accountant = gdp can give several times too small an epsilon; rdp and prv are bounds"

    def epsilon(self, delta: float, history: History) -> float:
        """Solve for the epsilon at which the composition has this delta."""
        return gaussian_epsilon(math.sqrt(sum(q**2 * n * float(np.expm1(sigma**-2)) for sigma, q, n in history)), delta)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon, at this delta, of a mechanism that tells no more than one draw of N(0, 1) or N(mu, 1); exact."""
    if math.isinf(mu) or gdp.delta_eps_mu(eps=0, mu=mu) <= delta:
        return math.inf if math.isinf(mu) else 0.0

    def excess(epsilon: float) -> float:
        """Return log(delta at epsilon) - log(delta); the deltas themselves could underflow."""
        first, second = log_ndtr(-epsilon / mu + mu / 2), log_ndtr(-epsilon / mu - mu / 2)
        return float(first + np.log(-np.expm1(min(epsilon + second - first, -1e-300))) - math.log(delta))

    return float(brentq(excess, 0.0, mu * (mu / 2 + math.sqrt(-2 * math.log(delta)))))
