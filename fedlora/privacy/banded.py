"""Noise that is correlated over rounds by a banded matrix (Choquette-Choo et al. 2023, arXiv 2306.08153).

The models of n rounds are the sums A X of their clipped updates X, with A the lower triangle of ones. A matrix C with
bands diagonals, lower triangular and Toeplitz, factors it: A = B C. Round t adds row t of C^-1 G, with G standard
normal: the models then have the noise B G, which is less than A G, since much of the rounds' noise cancels.

It is private because C X + G is what a run releases, in other words. An update in round t changes rows t to
t + bands - 1 of C X, by the norm of a column of C, which is 1. Clients are divided into as many groups as there are
bands, and each round draws from one of them in turn. The rows that a client's updates change never overlap, so that
each of its turns is a Gaussian mechanism by itself, Poisson-sampled if clients are.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize
from scipy.signal import lfilter

from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.privacy.calibration import plan_server
from fedlora.privacy.mechanisms import mechanism_of

if TYPE_CHECKING:
    import torch

_LEAST_RATIO = 0.01
"""Of one coefficient to the one before it, so that none is 0."""


@lru_cache(maxsize=256)
def band_coefficients(bands: int, releases: int) -> tuple[float, ...]:
    """Return the first column of C, of norm 1, that gives the sums of all rounds the least squared noise.

    Parameters
    ----------
    bands : int
    releases : int
        n, rounds of the run.

    Notes
    -----
    The search begins at the square root of A, the coefficients of (1 - x)^(-1/2), whose first ``bands`` are kept. No
    coefficient is larger than the one before it: by the theorem of Enestrom and Kakeya, C^-1 then does not grow with n.
    """
    if bands == 1:
        return (1.0,)
    weights = np.arange(releases, 0, -1.0)  # in so many sums is a row of the first column of B

    def log_error(ratios: np.ndarray) -> tuple[float, np.ndarray]:
        column = np.cumprod([1.0, *ratios])
        factor = lfilter([1.0], column, np.ones(releases))
        slope = lfilter([1.0], column, factor)  # of the factor, by the coefficients: -slope, shifted
        error, square = float(weights * factor @ factor), float(column @ column)
        by_column = np.array([weights[j:] * factor[j:] @ slope[: releases - j] for j in range(1, bands)])
        by_log = 2 * column[1:] * (column[1:] / square - by_column / error)
        return float(np.log(error * square)), np.cumsum(by_log[::-1])[::-1] / ratios

    k = np.arange(1, bands)
    found = minimize(log_error, 1 - 0.5 / k, jac=True, method="L-BFGS-B", bounds=[(_LEAST_RATIO, 1)] * (bands - 1))
    column = np.cumprod([1.0, *found.x])
    return tuple(float(number) for number in column / np.linalg.norm(column))


def prefix_error(coefficients: tuple[float, ...], releases: int) -> float:
    """Return the root mean square of the noise B G in the sums of all rounds, in standard deviations of G."""
    factor = lfilter([1.0], coefficients, np.ones(releases))
    return float(np.sqrt(np.arange(releases, 0, -1.0) * factor @ factor / releases))


class BandedNoise:
    """Makes the rows of C^-1 G one by one, of those of G.

    Parameters
    ----------
    coefficients : sequence of float
        The first column of C, as far as it is not 0.

    Attributes
    ----------
    earlier : list of Tensor
        The last rows, at most as many as there are bands less one, the last one first.
    """

    def __init__(self, coefficients: tuple[float, ...]) -> None:
        self.coefficients = coefficients
        self.earlier: list[torch.Tensor] = []

    def next(self, normal: torch.Tensor) -> torch.Tensor:
        """Return the next row, of the next row of G: by back-substitution, C times the rows is G."""
        first, *others = self.coefficients
        row = normal
        for coefficient, before in zip(others, self.earlier, strict=False):
            row = row - coefficient * before
        row = row / first
        self.earlier = [row, *self.earlier][: len(others)]
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from; other coefficients would not fit the earlier rows."""
        return {"coefficients": list(self.coefficients), "rows": {str(k): row for k, row in enumerate(self.earlier)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.coefficients = tuple(map(float, state["coefficients"]))
        self.earlier = [state["rows"][str(k)] for k in range(len(state["rows"]))]


@dataclass(frozen=True)
class BandNoise:
    """The noise of a run with so many bands.

    Attributes
    ----------
    bands : int
    noise_multiplier : float
    model_noise : float
        Standard deviation of the noise on each number of a round's model, root mean square over the rounds, in units of
        ``clipping_norm``.
    """

    bands: int
    noise_multiplier: float
    model_noise: float


def compare_bands(config: Config, clients: int) -> list[BandNoise]:
    """Compare the noise that a run's models have with its bands, with one, and with half and twice as many.

    Parameters
    ----------
    config : Config
        With ``privacy.target_epsilon``.
    clients : int

    Returns
    -------
    list of BandNoise
        By rising bands, each with Poisson sampling, as far as they are possible. Empty where noise is not correlated,
        or there is no epsilon to compare at.
    """
    own = config.privacy.groups
    if own == 1 or config.privacy.target_epsilon is None:
        return []
    found = []
    for bands in sorted({1, own // 2, own, 2 * own}):
        privacy = config.privacy.model_copy(update={"bands": bands})
        server = config.server.model_copy(update={"sampling": "poisson"})
        other = config.model_copy(update={"privacy": privacy, "server": server})
        with suppress(InputError):
            mechanism_of(other).check(other)
            plan = plan_server(other, clients)
            error = prefix_error(band_coefficients(bands, plan.releases), plan.releases)
            noise = plan.update_noise_multiplier * error / plan.expected(clients)
            found.append(BandNoise(bands, plan.noise_multiplier, noise))
    return found


def band_advice(found: list[BandNoise]) -> str:
    """Say in a line which number of bands gives the models the least noise; "" where there is nothing to compare."""
    if not found:
        return ""
    parts = [
        f"bands = {one.bands} has {one.model_noise:.3g} (noise multiplier {one.noise_multiplier:.4g})" for one in found
    ]
    least = min(found, key=lambda one: one.model_noise).bands
    return f"noise in a round's model, in clipping norms: {', '.join(parts)}; bands = {least} has the least"
