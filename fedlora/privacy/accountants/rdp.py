"""Renyi differential privacy (Mironov, Talwar, Zhang 2019, arXiv 1908.10530): an upper bound, cheap."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis import rdp
from scipy.special import binom, gammaln, logsumexp

from fedlora.privacy.accountants import Accountant, GroupHistory, History
from fedlora.privacy.accountants._groups import GroupStep

_ORDERS = [*RDPAccountant.DEFAULT_ALPHAS, 80, 128, 256, 512]
"""Opacus' own orders end at 63, at which no noise comes below epsilon 0.1 for delta 1e-5, a start's share of 1."""

_SPREAD = np.unique(np.searchsorted(_ORDERS, np.geomspace(0.1, _ORDERS[-1] - 1, 156) + 1 - 1e-9))
"""Places of orders that grow by some 6 %: those for groups, whose divergences are integrals."""

_FIRST = [_ORDERS.index(order) for order in (2, 4, 8, 16)]
"""Places of the orders that are looked at in any case."""


class Rdp(Accountant):
    """As Opacus' accountant, but with more orders, with a step's divergences cached, and without needless ones."""

    name = kind = "rdp"
    is_bound = counts_groups = True

    def epsilon(self, delta: float, history: History) -> float:
        """Add the steps' divergences and convert the sum at the best order.

        An order is left out where a lower bound shows that it is not the best one.
        """
        spent, known = np.full(len(_ORDERS), np.inf), np.zeros(len(_ORDERS), bool)
        places = _FIRST
        while True:
            for place in places:
                spent[place], known[place] = sum(_divergence(sigma, q, place) * n for sigma, q, n in history), True
            best = _convert(spent, delta)
            least = _least(spent, known, delta)
            places = [int(np.argmin(least))]
            if known.all() or least[places[0]] > best:
                return best

    def group_epsilon(self, delta: float, history: GroupHistory) -> float:
        """Add the divergences of mixtures of Gaussians."""
        spent = np.full(len(_ORDERS), np.inf)
        spent[_SPREAD] = sum(_group_divergences(sigma, q, k) * n for sigma, q, n, k in history)
        return _convert(spent, delta)


def _convert(spent: np.ndarray, delta: float) -> float:
    # It can come out below 0, where (0, delta) holds.
    return max(0.0, float(rdp.get_privacy_spent(orders=_ORDERS, rdp=spent, delta=delta)[0]))


def _least(spent: np.ndarray, known: np.ndarray, delta: float) -> np.ndarray:
    """Lower bounds of epsilon at the orders that are not known, given the divergences at those that are.

    (alpha - 1) times the divergence, log A, is convex, and 0 at 0 and 1: it lies above the lines through its values at
    the two known orders below, and at the two above. The bound of a known order is infinite.
    """
    orders = np.array(_ORDERS)
    there = known & np.isfinite(spent)
    x = np.array([0.0, 1.0, *orders[there]])
    log_a = np.array([0.0, 0.0, *spent[there] * (orders[there] - 1)])
    slopes = np.diff(log_a) / np.diff(x)
    above = np.searchsorted(x, orders)
    line = log_a[above - 1] + slopes[above - 2] * (orders - x[above - 1])
    two = above < len(x) - 1
    right = np.minimum(above, len(x) - 2)
    line = np.where(two, np.maximum(line, log_a[right] - slopes[right] * (x[right] - orders)), line)
    line -= 1e-9 * np.abs(line)  # a margin for rounding
    epsilon = (line - np.log(delta) - np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    return np.where(known, np.inf, np.nan_to_num(epsilon, nan=-np.inf))


def _is_small(sigma: float, q: float) -> bool:
    """Whether Opacus' series takes up to minutes, for much noise, or keeps few digits of a divergence near 0."""
    return q < 1 and (sigma > 1 or q**2 * float(np.expm1(sigma**-2)) < 1e-6)


@lru_cache(maxsize=65536)
def _divergence(sigma: float, q: float, place: int) -> float:
    """Renyi divergence of one step at one of ``_ORDERS``."""
    if _is_small(sigma, q):
        return _small_divergence(sigma, q, place)
    return float(rdp.compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=[_ORDERS[place]])[0])


@lru_cache(maxsize=65536)
def _group_divergences(sigma: float, q: float, group: int) -> np.ndarray:
    """Renyi divergences of one step of a unit with so many examples, at the orders of ``_SPREAD``."""
    return GroupStep(sigma, q, group).divergences(np.array(_ORDERS)[_SPREAD])


def _small_divergence(sigma: float, q: float, place: int) -> float:
    """Take log A / (alpha - 1), A = E (1 + q y)^alpha, from sums that have positive terms alone.

    Here y = exp((2 z - 1) / (2 sigma^2)) - 1 and z ~ N(0, sigma^2) (Mironov, Talwar, Zhang 2019, arXiv 1908.10530). An
    order that is left out, as infinite, makes the bound larger, not wrong.
    """
    alpha = np.float64(_ORDERS[place])
    if alpha % 1 == 0:
        # The binomial series without the 1 that all its factors exp(0) sum to.
        i = np.arange(2, alpha + 1)
        chosen = (
            gammaln(alpha + 1) - gammaln(i + 1) - gammaln(alpha - i + 1) + i * np.log(q) + (alpha - i) * np.log1p(-q)
        )
        exponent = (i * i - i) / (2 * sigma**2)
        log_a = np.logaddexp(0, logsumexp(chosen + exponent + np.log(-np.expm1(-exponent))))
    elif sigma >= 1:
        weights, w = _grid(sigma, q)
        near = np.polyval([*binom(alpha, np.arange(9, 1, -1)), 0, 0], w)
        far = np.expm1(alpha * np.log1p(w)) - alpha * w
        log_a = np.log1p(weights @ np.where(np.abs(w) < 0.01, near, far))
    else:
        log_a = np.inf
    return float(log_a / (alpha - 1))


@lru_cache(maxsize=64)
def _grid(sigma: float, q: float) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and values q y of the trapezoidal rule.

    It is exact to rounding here, without the term alpha q y, whose mean is 0.
    """
    x = np.arange(-12, max(order for order in _ORDERS if order % 1) / sigma + 12, 1 / 16)
    return np.exp(-(x**2) / 2) / (16 * math.sqrt(2 * math.pi)), q * np.expm1(x / sigma - 0.5 / sigma**2)
