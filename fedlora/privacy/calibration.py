"""How much noise a client adds: once for all the steps that it could take, by its own sampling rate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from opacus.accountants import RDPAccountant, create_accountant
from opacus.accountants.analysis import gdp, rdp

from fedlora.config import Config, PrivacySection
from fedlora.errors import InputError

_MAX_SIGMA = 1e4
_ORDERS = [*RDPAccountant.DEFAULT_ALPHAS, 80, 128, 256, 512]
"""Opacus' own orders end at 63, at which no noise comes below epsilon 0.1 for delta 1e-5, a start's share of 1."""


@dataclass(frozen=True)
class PrivacyPlan:
    """What one client's DP-SGD needs to know.

    Attributes
    ----------
    sample_rate : float
        q = min(1, B / n), the probability with which each example enters a step.
    noise_multiplier : float
        sigma; the noise's standard deviation is sigma times ``max_grad_norm``.
    max_grad_norm : float
        C, the bound on an example's gradient over all trainables together.
    expected_batch_size : float
        q n, by which the noised sum is divided.
    steps : int
        Steps that the client could take in the whole federation; the calibration covers them all.
    delta : float
    accountant : str
    ceiling : float or None
        Epsilon that the client never exceeds; None where the noise was given instead.
    start_noise_multiplier : float or None
        sigma of a start that is made from the client's own examples; None where the start reads none.
    start_sample_rate : float
        The probability with which each example enters that start.
    """

    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    steps: int
    delta: float
    accountant: str
    ceiling: float | None
    start_noise_multiplier: float | None = None
    start_sample_rate: float = 0.0

    @property
    def start(self) -> list[tuple[float, float, int]]:
        """The start from the client's examples, as a ledger's history holds it; empty where it reads none."""
        sigma = self.start_noise_multiplier
        return [] if sigma is None else [(sigma, self.start_sample_rate, 1)]


START_SHARE = 0.1
"""Of a client's epsilon, for a start that is made from its examples."""


def local_steps(config: Config, examples: int) -> int:
    """Steps of one client in one round: ``local_steps``, or ``local_epochs`` (1 by default) over its examples."""
    if config.client.local_steps is not None:
        return config.client.local_steps
    batches = -(-examples // min(config.client.batch_size, examples))
    return batches * (config.client.local_epochs or 1)


def check_delta(privacy: PrivacySection, examples: int) -> None:
    """Refuse a delta that would allow to publish an example outright.

    Raises
    ------
    InputError
        If ``target_delta`` >= 1 / n.
    """
    if privacy.target_delta >= 1 / examples:
        raise InputError(
            "privacy.target_delta",
            privacy.target_delta,
            f"must be below 1 / n = {1 / examples:.3g} for a client of {examples} examples; lower it",
        )


def plan_privacy(config: Config, examples: int) -> PrivacyPlan:
    """Calibrate one client's noise for rounds x local steps.

    Parameters
    ----------
    config : Config
        With ``privacy.mode = "example"``.
    examples : int
        n, the client's number of examples (treated as public).

    Raises
    ------
    InputError
        If delta >= 1 / n, or no noise reaches the target epsilon.
    """
    privacy = config.privacy
    check_delta(privacy, examples)
    rate = min(1.0, config.client.batch_size / examples)
    steps = config.run.rounds * local_steps(config, examples)
    sigma = privacy.noise_multiplier
    start, start_rate = None, 0.0
    if config.start_reads_examples():
        start_rate = min(1.0, config.method.router_documents / examples)
        epsilon = privacy.target_epsilon
        start = sigma
        if epsilon is not None:
            share = START_SHARE * epsilon
            start = noise_multiplier(share, privacy.target_delta, start_rate, 1, privacy.accountant)
    if sigma is None:
        assert privacy.target_epsilon is not None
        spent = () if start is None else ((start, start_rate, 1),)
        sigma = noise_multiplier(privacy.target_epsilon, privacy.target_delta, rate, steps, privacy.accountant, spent)
    return PrivacyPlan(
        sample_rate=rate,
        noise_multiplier=sigma,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=rate * examples,
        steps=steps,
        delta=privacy.target_delta,
        accountant=privacy.accountant,
        ceiling=privacy.target_epsilon,
        start_noise_multiplier=start,
        start_sample_rate=start_rate,
    )


@lru_cache(maxsize=65536)
def noise_multiplier(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str,
    spent: tuple[tuple[float, float, int], ...] = (),
    tolerance: float = 1e-3,
) -> float:
    """Smallest sigma, to a share ``tolerance``, whose ``steps`` Poisson-sampled Gaussian steps stay within epsilon.

    ``spent`` are other steps (noise multiplier, sample rate, number) that epsilon has to cover too.

    Notes
    -----
    Opacus' ``get_noise_multiplier`` stops at an absolute tolerance of 0.01 in epsilon, a tenth of a small budget, and
    searches among values where its prv accountant does not come back.

    Raises
    ------
    InputError
        If no noise reaches epsilon.
    """
    low, high = 0.0, math.inf

    def total(sigma: float) -> float:
        """Epsilon; of a sigma that was tried before it is remembered."""
        return spent_epsilon(accountant, delta, (*spent, (sigma, sample_rate, steps)))

    def attempt(sigma: float) -> None:
        nonlocal low, high
        if total(sigma) > epsilon:
            low = max(low, sigma)
        else:
            high = min(high, sigma)

    if accountant == "prv":
        for sigma in _close_to(total, epsilon, delta, sample_rate, steps, spent):
            attempt(sigma)
    while math.isinf(high):
        attempt(2 * low or 1.0)
        if 2 * low > _MAX_SIGMA:
            raise InputError(
                "privacy.target_epsilon", epsilon, f"is not reached by any noise under {accountant}; raise it"
            )
    while high - low > tolerance * high:
        attempt((low + high) / 2)
    return high


def _close_to(
    total: Callable[[float], float],
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    spent: tuple[tuple[float, float, int], ...],
) -> Iterator[float]:
    """Yield sigmas around the one at which ``total``, that of prv, is epsilon: each question to prv takes long.

    The rdp accountant's sigma, which costs little, is a few percent more. Between it and a slightly smaller one
    log epsilon is nearly linear in log sigma; what that gives is tried a little below and a little above.
    """
    try:
        first = noise_multiplier(epsilon, delta, sample_rate, steps, "rdp", spent, tolerance=0.03)
    except InputError:
        return  # there may be a sigma all the same: prv is the tighter bound
    second = 0.93 * first
    yield from (first, second)
    if not 0 < total(first) < total(second) < math.inf:
        return
    slope = math.log(total(second) / total(first)) / math.log(second / first)
    guess = first * (epsilon / total(first)) ** (1 / slope)
    yield from (guess * (1 - 4e-4), guess * (1 + 4e-4))


@lru_cache(maxsize=65536)
def spent_epsilon(accountant: str, delta: float, history: tuple[tuple[float, float, int], ...]) -> float:
    """Epsilon of steps (noise multiplier, sample rate, number), by one of Opacus' accountants.

    Clients of like histories share one computation, which takes prv up to a second.
    """
    if not history:
        return 0.0
    if any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if accountant == "gdp":
            return _gdp_epsilon(delta, history)
        if accountant == "rdp":
            return _rdp_epsilon(delta, history)
        mechanism = create_accountant(accountant)
        mechanism.history = list(history)
        return float(mechanism.get_epsilon(delta=delta))


def _rdp_epsilon(delta: float, history: tuple[tuple[float, float, int], ...]) -> float:
    """Do as Opacus' accountant, which takes a step's Renyi divergences anew for every question, with more orders."""
    spent = sum(_step_rdp(sigma, q) * n for sigma, q, n in history)
    # The conversion can come out below 0, where (0, delta) holds.
    return max(0.0, float(rdp.get_privacy_spent(orders=_ORDERS, rdp=spent, delta=delta)[0]))


@lru_cache(maxsize=65536)
def _step_rdp(sigma: float, sample_rate: float) -> np.ndarray:
    return rdp.compute_rdp(q=sample_rate, noise_multiplier=sigma, steps=1, orders=_ORDERS)


def _gdp_epsilon(delta: float, history: tuple[tuple[float, float, int], ...]) -> float:
    """Compose unlike steps by mu^2 = sum mu_i^2: Opacus' own accountant reads the last entry of a history alone."""
    mu = math.hypot(
        *(gdp.compute_mu_poisson(steps=n, noise_multiplier=sigma, sample_rate=q) for sigma, q, n in history)
    )
    if gdp.delta_eps_mu(eps=0, mu=mu) <= delta:
        return 0.0
    try:
        return float(gdp.eps_from_mu(mu=mu, delta=delta))
    except ValueError:
        # It searches up to 500, and says so in this way where that is not enough.
        return math.inf
