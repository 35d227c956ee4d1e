"""Renyi differential privacy (Mironov, Talwar, Zhang 2019, arXiv 1908.10530): an upper bound, cheap."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis import rdp
from scipy.special import binom, gammaln, logsumexp

from fedlora.privacy.accountants import Accountant, History

_ORDERS = [*RDPAccountant.DEFAULT_ALPHAS, 80, 128, 256, 512]
"""Opacus' own orders end at 63, at which no noise comes below epsilon 0.1 for delta 1e-5, a start's share of 1."""


class Rdp(Accountant):
    """As Opacus' accountant, but with more orders, and with the Renyi divergences of a step cached."""

    name = "rdp"
    is_bound = True

    def epsilon(self, delta: float, history: History) -> float:
        """Add the steps' divergences and convert the sum at the best order."""
        spent = sum(_step_rdp(sigma, q) * n for sigma, q, n in history)
        # The conversion can come out below 0, where (0, delta) holds.
        return max(0.0, float(rdp.get_privacy_spent(orders=_ORDERS, rdp=spent, delta=delta)[0]))


@lru_cache(maxsize=65536)
def _step_rdp(sigma: float, sample_rate: float) -> np.ndarray:
    """Renyi divergences of one step, at ``_ORDERS``.

    Opacus' series takes up to minutes for much noise, and of divergences near 0 it keeps few digits or the wrong sign.
    """
    if sample_rate < 1 and (sigma > 1 or sample_rate**2 * np.expm1(sigma**-2) < 1e-6):
        return _small_step_rdp(sigma, sample_rate)
    return rdp.compute_rdp(q=sample_rate, noise_multiplier=sigma, steps=1, orders=_ORDERS)


def _small_step_rdp(sigma: float, q: float) -> np.ndarray:
    """Take log A / (alpha - 1), A = E (1 + q y)^alpha, from sums that have positive terms alone.

    Here y = exp((2 z - 1) / (2 sigma^2)) - 1 and z ~ N(0, sigma^2) (Mironov, Talwar, Zhang 2019, arXiv 1908.10530). An
    order that is left out, as infinite, makes the bound larger, not wrong.
    """
    orders = np.array(_ORDERS)
    log_a = np.full(len(orders), np.inf)
    for k in np.flatnonzero(orders % 1 == 0):
        # The binomial series without the 1 that all its factors exp(0) sum to.
        alpha, i = orders[k], np.arange(2, orders[k] + 1)
        chosen = (
            gammaln(alpha + 1) - gammaln(i + 1) - gammaln(alpha - i + 1) + i * np.log(q) + (alpha - i) * np.log1p(-q)
        )
        exponent = (i * i - i) / (2 * sigma**2)
        log_a[k] = np.logaddexp(0, logsumexp(chosen + exponent + np.log(-np.expm1(-exponent))))
    if sigma >= 1:
        # The trapezoidal rule, exact to rounding here, without the term alpha q y, whose mean is 0.
        x = np.arange(-12, orders[orders % 1 != 0].max() / sigma + 12, 1 / 16)
        weights = np.exp(-(x**2) / 2) / (16 * math.sqrt(2 * math.pi))
        w = q * np.expm1(x / sigma - 0.5 / sigma**2)
        for k in np.flatnonzero(orders % 1 != 0):
            alpha = orders[k]
            near = np.polyval([*binom(alpha, np.arange(9, 1, -1)), 0, 0], w)
            far = np.expm1(alpha * np.log1p(w)) - alpha * w
            log_a[k] = np.log1p(weights @ np.where(np.abs(w) < 0.01, near, far))
    return log_a / (orders - 1)
