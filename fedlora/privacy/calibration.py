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
from scipy.optimize import brentq
from scipy.special import binom, gammaln, log_ndtr, logsumexp

from fedlora.config import MAX_NOISE, MIN_NOISE, Config, PrivacySection
from fedlora.errors import InputError
from fedlora.methods import get_method

MAX_STEPS = 10**9
"""Of one client in a federation: rounding in one step's epsilon, so many times, is still far below 0.001."""

_ORDERS = [*RDPAccountant.DEFAULT_ALPHAS, 80, 128, 256, 512]
"""Opacus' own orders end at 63, at which no noise comes below epsilon 0.1 for delta 1e-5, a start's share of 1."""

_PRV_BINS = 2**18
"""So many bins, of all kinds of steps together, the prv accountant may take; a question then ends in about a second."""
_PRV_ERROR, _PRV_MAX_ERROR = 0.01, 0.1
"""Of epsilon, for which it takes so many bins, and which is added to what it finds; by default, and at most."""
_PRV_MAX_STEPS, _PRV_MAX_NOISE = 10**5, 50.0
"""Beyond these Opacus' prv accountant rounds too much or is too slow."""


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
        If delta >= 1 / n, the steps are more than ``MAX_STEPS``, no noise reaches the target epsilon, or the noise that
        was given has no finite epsilon.
    """
    privacy = config.privacy
    check_delta(privacy, examples)
    rate = min(1.0, config.client.batch_size / examples)
    local = local_steps(config, examples)
    steps = config.run.rounds * local
    if steps > MAX_STEPS:
        remedy = (
            f"with {local} local steps each is more than {MAX_STEPS:.0e} steps, which no accountant resolves; lower it"
        )
        raise InputError("run.rounds", config.run.rounds, remedy)
    sigma = privacy.noise_multiplier
    start, start_rate = None, 0.0
    if read := get_method(config.method.name).start_examples(config):
        start_rate = min(1.0, read / examples)
        epsilon = privacy.target_epsilon
        start = sigma
        if epsilon is not None:
            share = START_SHARE * epsilon
            start = noise_multiplier(share, privacy.target_delta, start_rate, 1, privacy.accountant)
    if sigma is None:
        assert privacy.target_epsilon is not None
        spent = () if start is None else ((start, start_rate, 1),)
        sigma = noise_multiplier(privacy.target_epsilon, privacy.target_delta, rate, steps, privacy.accountant, spent)
    elif sigma and math.isinf(spent_epsilon(privacy.accountant, privacy.target_delta, ((sigma, rate, steps),))):
        remedy = f"has no finite epsilon under {privacy.accountant}; raise it, or choose rdp"
        raise InputError("privacy.noise_multiplier", sigma, remedy)
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

    ``spent`` are other steps (noise multiplier, sample rate, number) that epsilon has to cover too. Sigma is at least
    ``MIN_NOISE``, however large epsilon is.

    Notes
    -----
    Opacus' ``get_noise_multiplier`` stops at an absolute tolerance of 0.01 in epsilon, a tenth of a small budget, and
    searches among values where its prv accountant does not come back.

    Raises
    ------
    InputError
        If no noise up to ``MAX_NOISE`` reaches epsilon.
    """
    low, high = 0.0, math.inf
    if accountant == "prv" and epsilon <= _PRV_ERROR:
        accountant = "rdp"  # what prv adds for its error is more than epsilon

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
        if 2 * low > MAX_NOISE:
            raise InputError(
                "privacy.target_epsilon", epsilon, f"is not reached by any noise under {accountant}; raise it"
            )
    while high - low > tolerance * high and high > MIN_NOISE:
        attempt((low + high) / 2)
    return max(high, MIN_NOISE)


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

    Every question has an answer, after a few seconds at most: steps that were taken must be counted. A noise multiplier
    below ``MIN_NOISE`` counts as no noise. Where prv would take too long or round too much, rdp's bound, which is
    larger, stands in. Clients of like histories share one computation.
    """
    if not history:
        return 0.0
    if any(sigma < MIN_NOISE for sigma, _, _ in history):
        return math.inf
    # The bound of less noise holds for more.
    history = tuple((min(sigma, 10 * MAX_NOISE), q, n) for sigma, q, n in history)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if accountant == "gdp":
            return _gdp_epsilon(delta, history)
        if accountant == "prv":
            return min(_prv_epsilon(delta, history), _rdp_epsilon(delta, history))
        return _rdp_epsilon(delta, history)


def _rdp_epsilon(delta: float, history: tuple[tuple[float, float, int], ...]) -> float:
    """Do as Opacus' accountant, which takes a step's Renyi divergences anew for every question, with more orders."""
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


def _prv_epsilon(delta: float, history: tuple[tuple[float, float, int], ...]) -> float:
    """Ask Opacus' prv accountant, on a grid of bounded size; infinite where it has no sound answer on such a grid."""
    steps = sum(n for _, _, n in history)
    if steps > _PRV_MAX_STEPS or any(sigma > _PRV_MAX_NOISE for sigma, _, _ in history):
        return math.inf
    # The bins that it would make for its error in epsilon, by the domain and the mesh that it chooses.
    slack = delta / 1000
    single = (_rdp_epsilon(slack / (8 * steps), ((sigma, q, 1),)) for sigma, q, _ in history)
    reach = 3 + max(_rdp_epsilon(slack / 4, history), *single)
    bins = len(history) * 2 * reach * math.sqrt(steps * math.log(12 / slack) / 2) / _PRV_ERROR
    error = _PRV_ERROR * max(1.0, bins / _PRV_BINS)
    if error > _PRV_MAX_ERROR:
        return math.inf
    mechanism = create_accountant("prv")
    mechanism.history = list(history)
    try:
        epsilon = float(mechanism.get_epsilon(delta=delta, eps_error=error))
    except (RuntimeError, ValueError):  # the grid is too coarse for the mean, or too long for delta
        return math.inf
    return math.inf if math.isnan(epsilon) else max(0.0, epsilon)


def _gdp_epsilon(delta: float, history: tuple[tuple[float, float, int], ...]) -> float:
    """Compose unlike steps by mu^2 = sum mu_i^2: Opacus' own accountant reads the last entry of a history alone."""
    mu = math.sqrt(sum(q**2 * n * float(np.expm1(sigma**-2)) for sigma, q, n in history))
    if math.isinf(mu) or gdp.delta_eps_mu(eps=0, mu=mu) <= delta:
        return math.inf if math.isinf(mu) else 0.0

    def excess(epsilon: float) -> float:
        """Log delta at epsilon over log delta, where either is too small for its own value."""
        first, second = log_ndtr(-epsilon / mu + mu / 2), log_ndtr(-epsilon / mu - mu / 2)
        return float(first + np.log(-np.expm1(min(epsilon + second - first, -1e-300))) - math.log(delta))

    return float(brentq(excess, 0.0, mu * (mu / 2 + math.sqrt(-2 * math.log(delta)))))
