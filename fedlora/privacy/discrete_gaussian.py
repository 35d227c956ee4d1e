"""The distributed discrete Gaussian mechanism (Kairouz, Liu, Steinke 2021, arXiv 2102.06387).

Each client clips its vector, rounds it to whole numbers and adds discrete Gaussian noise. A secure sum then holds the
noise of all clients together. Neighbouring inputs differ in one client's vector, which zeros take the place of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedlora.errors import InputError

Uniform = Callable[[int], np.ndarray]
"""Draws so many numbers of [0, 1)."""

TAIL = 12.0
"""Standard deviations of the sum's noise that fit beside the sum: what lies beyond has probability 1e-32."""
LEAST_STDDEV = 4.0
"""Of a client's noise: a sum of wider ones is a discrete Gaussian but for a share of 1e-60 (tau, below)."""
_MODULUS = 2**32


@dataclass(frozen=True)
class NoisySum:
    """A sum of clipped, rounded and noised vectors.

    Attributes
    ----------
    scale : float
        Whole numbers of 1.
    norm : float
        Euclidean norm of a rounded vector at most, in whole numbers.
    stddev : float
        Parameter sigma of each client's noise, in whole numbers.
    clipping_norm : float
        C, of a vector before it is rounded.
    size : int
        d, numbers of a vector.
    """

    scale: float
    norm: float
    stddev: float
    clipping_norm: float
    size: int

    @classmethod
    def of(cls, noise_multiplier: float, clipping_norm: float, size: int, clients: int, summands: int) -> NoisySum:
        """Return the finest one that fits into residues modulo 2^32.

        Parameters
        ----------
        noise_multiplier : float
            z, of a sum with the noise of ``summands`` clients.
        clipping_norm : float
        size : int
        clients : int
            Whose vectors the sum may hold at most.
        summands : int
            How many of them are promised to add their noise; 1 where each adds all of it.

        Raises
        ------
        InputError
            If so many clients and so much noise leave too few whole numbers.
        """
        # A number of the sum is at most clients * norm; its noise has deviation z * norm * sqrt(clients / summands).
        norm = (_MODULUS / 2 - 1) // (clients + TAIL * noise_multiplier * math.sqrt(clients / summands))
        steps = norm - math.sqrt(size)
        norm = rounded_norm(steps, size) if steps > 0 else 0.0
        stddev = noise_multiplier * norm / math.sqrt(summands)
        if steps <= math.sqrt(size) or (noise_multiplier and stddev < LEAST_STDDEV):
            remedy = f"leaves too few whole numbers below 2^32 for {size} numbers of {clients} clients; lower the noise"
            raise InputError("privacy.noise_multiplier", noise_multiplier, f"{remedy}, or ask fewer clients")
        return cls(steps / clipping_norm, norm, stddev, clipping_norm, size)

    def encode(self, numbers: np.ndarray, uniform: Uniform) -> np.ndarray:
        """Clip a vector, round it, and add a client's noise.

        Parameters
        ----------
        numbers : ndarray of float64 [d]
        uniform : callable

        Returns
        -------
        ndarray of int64 [d]
        """
        length = float(np.linalg.norm(numbers))
        shortened = numbers * min(1.0, self.clipping_norm / max(length, 1e-300))
        whole = round_below(shortened * self.scale, self.norm, uniform)
        return whole + discrete_gaussian(self.stddev, self.size, uniform) if self.stddev else whole

    def noise_multiplier(self, summands: int) -> float:
        """Return the noise multiplier of a Gaussian mechanism that is no more private than a sum of so much noise.

        Notes
        -----
        A sum of n clients' noise is (1/2) e^2-concentrated private with e = norm / (sqrt(n) sigma) + sqrt(d) tau,
        tau = 10 sum_{k < n} exp(-2 pi^2 sigma^2 k / (k + 1)) (theorem 1): its Renyi divergences are those of a Gaussian
        mechanism of noise multiplier 1 / e.
        """
        if not self.stddev:
            return 0.0
        return 1 / (self.norm / (math.sqrt(summands) * self.stddev) + math.sqrt(self.size) * tau(self.stddev, summands))


def rounded_norm(norm: float, size: int) -> float:
    """Return the norm that a vector of a norm keeps to by stochastic rounding, with probability 0.39 at least.

    It is the bound of arXiv 2102.06387, theorem 1, with beta = exp(-1/2).
    """
    root = math.sqrt(size)
    return min(math.sqrt(norm**2 + size / 4 + norm + root / 2), norm + root)


def tau(stddev: float, summands: int) -> float:
    """Return how far, at most, a sum of discrete Gaussians is from a discrete Gaussian (theorem 1)."""
    return 10 * math.fsum(math.exp(-2 * (math.pi * stddev) ** 2 * k / (k + 1)) for k in range(1, summands))


def round_below(numbers: np.ndarray, norm: float, uniform: Uniform) -> np.ndarray:
    """Round to a neighbouring whole number each, right on average, again until the norm is at most ``norm``.

    Notes
    -----
    The condition bounds what one client can change. The roundings that it leaves out bias the average a little.
    """
    below = np.floor(numbers)
    while True:
        whole = below + (uniform(len(numbers)) < numbers - below)
        if np.linalg.norm(whole) <= norm:
            return whole.astype(np.int64)


def discrete_gaussian(stddev: float, count: int, uniform: Uniform) -> np.ndarray:
    """Draw whole numbers k with probabilities in proportion to exp(-k^2 / (2 stddev^2)).

    Algorithm 3 of Canonne, Kamath, Steinke (2020, arXiv 2004.00010), with probabilities in float64: a discrete Laplace
    number of scale floor(stddev) + 1 is kept with the probability that is left.

    Returns
    -------
    ndarray of int64 [count]
    """
    scale, found, lack = math.floor(stddev) + 1, [np.zeros(0, np.int64)], count
    while lack:
        draws = max(64, 2 * lack)
        size = np.floor(-scale * np.log1p(-uniform(draws)))
        negative = uniform(draws) < 0.5
        kept = uniform(draws) < np.exp(-((size - stddev**2 / scale) ** 2) / (2 * stddev**2))
        kept &= ~(negative & (size == 0))
        found.append(np.where(negative, -size, size)[kept][:lack].astype(np.int64))
        lack -= len(found[-1])
    return np.concatenate(found)
