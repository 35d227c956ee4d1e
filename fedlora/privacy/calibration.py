"""How much noise a client adds: once for all the steps that it could take, by its own sampling rate."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fedlora.config import MAX_EPSILON, MAX_NOISE, MIN_NOISE, Config, PrivacySection
from fedlora.errors import InputError
from fedlora.methods import get_method
from fedlora.privacy.accountants import GroupHistory, History, Steps, get_accountant, group_of, steps_of

MAX_STEPS = 10**9
"""Of one client in a federation: rounding in one step's epsilon, so many times, is still far below 0.001."""


@dataclass(frozen=True)
class PrivacyPlan:
    """What one client's DP-SGD needs to know.

    Attributes
    ----------
    sample_rate : float
        q = min(1, B / n), the probability with which each example, or each unit, enters a step.
    noise_multiplier : float
        sigma; the noise's standard deviation is sigma times ``max_grad_norm``.
    max_grad_norm : float
        C, the bound on an example's gradient, or a unit's, over all trainables together.
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
    start_steps : int
        Noisy sums of which that start is made.
    samples_units : bool
        Whether steps draw units with all their examples, by :attr:`fedlora.data.tokens.TokenTable.units`.
    examples_per_unit : int or None
        With ``samples_units``, at most so many examples of a unit are in its gradient of a step.
    group : int
        Most examples of a protected unit that enter a step by themselves; 1 where the unit is what is drawn.
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
    start_steps: int = 1
    samples_units: bool = False
    examples_per_unit: int | None = None
    group: int = 1

    def charged(self, steps: int) -> Steps:
        """Return so many steps as a ledger holds them."""
        return steps_of(self.noise_multiplier, self.sample_rate, steps, self.group)

    @property
    def start(self) -> list[tuple[float, float, int]]:
        """The start from the client's examples, as a ledger's history holds it; empty where it reads none."""
        sigma = self.start_noise_multiplier
        return [] if sigma is None else [(sigma, self.start_sample_rate, self.start_steps)]

    def for_start(self) -> PrivacyPlan:
        """Return the plan of a start's exchanges, each of which is one step at the start's noise and rate.

        Raises
        ------
        ValueError
            If the start reads no examples, so that no noise was calibrated for it.
        """
        if self.start_noise_multiplier is None:
            raise ValueError("a start that the plan says nothing of has no noise")
        return replace(
            self,
            sample_rate=self.start_sample_rate,
            noise_multiplier=self.start_noise_multiplier,
            expected_batch_size=self.start_sample_rate * self.expected_batch_size / self.sample_rate,
            steps=self.start_steps,
            start_noise_multiplier=None,
            start_sample_rate=0.0,
        )


def local_steps(config: Config, examples: int) -> int:
    """Steps of one client in one round: ``local_steps``, or ``local_epochs`` (1 by default) over its examples."""
    if config.client.local_steps is not None:
        return config.client.local_steps
    batches = -(-examples // min(config.client.batch_size, examples))
    return batches * (config.client.local_epochs or 1)


def round_steps(config: Config, examples: int, server_round: int) -> int:
    """Steps of one client in all exchanges of a round."""
    exchanges = get_method(config.method.name).exchanges(config, server_round)
    return sum(local_steps(exchange.training(config), examples) for exchange in exchanges)


def run_steps(config: Config, examples: int) -> int:
    """Steps of one client in a whole run, in all exchanges of all rounds."""
    rounds = config.run.rounds
    if get_method(config.method.name).has_one_exchange():
        return rounds * local_steps(config, examples)
    return sum(round_steps(config, examples, server_round) for server_round in range(1, rounds + 1))


def check_delta(privacy: PrivacySection, units: int) -> None:
    """Refuse a delta that would allow to publish an example, or a person's, outright.

    Raises
    ------
    InputError
        If ``target_delta`` >= 1 / n.
    """
    if privacy.target_delta >= 1 / units:
        raise InputError(
            "privacy.target_delta",
            privacy.target_delta,
            f"must be below 1 / n = {1 / units:.3g} for a client of {units} "
            f"{'persons' if privacy.protects_units else 'examples'}; lower it",
        )


def plan_privacy(config: Config, examples: int, units: int | None = None) -> PrivacyPlan:
    """Calibrate one client's noise for all its steps in the run.

    Parameters
    ----------
    config : Config
        With ``privacy.mode = "example"``.
    examples : int
        n, the client's number of examples, or of units where these are drawn (treated as public).
    units : int, optional
        How many units the examples are of, for delta; by default as many as ``examples``.

    Raises
    ------
    InputError
        If delta >= 1 / n, the steps are more than ``MAX_STEPS``, no noise reaches the target epsilon, or the noise that
        was given has no finite epsilon.
    """
    privacy = config.privacy
    check_delta(privacy, examples if units is None else units)
    rate = min(1.0, config.client.batch_size / examples)
    local, steps = local_steps(config, examples), run_steps(config, examples)
    if steps > MAX_STEPS:
        remedy = (
            f"with {local} local steps each is more than {MAX_STEPS:.0e} steps, which no accountant resolves; lower it"
        )
        raise InputError("run.rounds", config.run.rounds, remedy)
    try:
        (start, start_rate, start_steps), sigma = _noises(config, examples, rate, steps)
    except InputError as error:
        if error.field != "privacy.target_epsilon" or not get_method(config.method.name).start_examples(config):
            raise
        # It is about the start's share of epsilon, or about the rounds beside a start of a smaller epsilon.
        least = _least_with_start(config, examples, rate, steps)
        raise _unreached(privacy.target_epsilon, privacy.accountant, least) from None
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
        start_steps=start_steps,
        samples_units=privacy.samples_units,
        examples_per_unit=privacy.examples_per_unit if privacy.samples_units else None,
        group=privacy.group,
    )


def _noises(config: Config, examples: int, rate: float, steps: int) -> tuple[tuple[float | None, float, int], float]:
    """Return what :func:`_start_noise` does, and the noise multiplier of the rounds beside it."""
    start, start_rate, start_steps = _start_noise(config, examples)
    spent = () if start is None else ((start, start_rate, start_steps),)
    return (start, start_rate, start_steps), _noise(config.privacy, rate, steps, spent)


def _start_noise(config: Config, examples: int) -> tuple[float | None, float, int]:
    """Return noise multiplier, sample rate and number of the noisy sums of which a client's start is made, if any.

    The start alone stays within its share of epsilon. The noise of the rounds is then calibrated for both together.
    """
    method, privacy = get_method(config.method.name), config.privacy
    read = method.start_examples(config)
    if not read:
        return None, 0.0, 1
    rate, steps = min(1.0, read / examples), max(1, len(method.start_exchanges(config)))
    if privacy.target_epsilon is None:
        return privacy.noise_multiplier, rate, steps
    share = method.start_share(config) * privacy.target_epsilon
    return noise_multiplier(share, privacy.target_delta, rate, steps, privacy.accountant), rate, steps


def _least_with_start(config: Config, examples: int, rate: float, steps: int) -> float:
    """Return the smallest target, to 1 %, that a client's start and its rounds reach together; infinite without one.

    For prv it is rdp's: that is found much faster, and what rdp reaches prv reaches.
    """
    privacy = config.privacy
    fast = get_accountant(privacy.accountant).for_calibration(0.0)

    def reaches(target: float) -> bool:
        changed = privacy.model_copy(update={"target_epsilon": target, "accountant": fast})
        try:
            _noises(config.model_copy(update={"privacy": changed}), examples, rate, steps)
        except InputError:
            return False
        return True

    assert privacy.target_epsilon is not None
    low, high = privacy.target_epsilon, MAX_EPSILON
    if not reaches(high):
        return math.inf
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _unreached(epsilon: float | None, accountant: str, least: float) -> InputError:
    """Return the error about a target that no noise reaches, with the smallest that some noise does."""
    remedy = f"is not reached by any noise under {accountant}, and neither is a larger one; lower run.rounds"
    if least < MAX_EPSILON:
        unit = 10.0 ** (math.floor(math.log10(max(least, 1e-9))) - 2)
        above = (math.floor(least / unit) + 1) * unit  # three digits, rounded up: that one is reached
        remedy = f"is not reached by any noise under {accountant}; raise it to {above:.3g}, the smallest that is"
    return InputError("privacy.target_epsilon", epsilon, remedy)


def _noise(privacy: PrivacySection, rate: float, steps: int, spent: History = ()) -> float:
    """Return the noise multiplier that was given, or the one that the target needs beside what else is spent.

    Raises
    ------
    InputError
        If the one that was given has no finite epsilon, or none reaches the target.
    """
    sigma, delta, accountant = privacy.noise_multiplier, privacy.target_delta, privacy.accountant
    group = privacy.group
    if sigma is None:
        assert privacy.target_epsilon is not None
        return noise_multiplier(privacy.target_epsilon, delta, rate, steps, accountant, spent, group=group)
    if sigma and math.isinf(spent_epsilon(accountant, delta, (steps_of(sigma, rate, steps, group),))):
        remedy = f"has no finite epsilon under {accountant}; raise it, or choose another accountant"
        raise InputError("privacy.noise_multiplier", sigma, remedy)
    return sigma


@dataclass(frozen=True)
class ServerPlan:
    """The privacy of a run whose server adds noise to the sum of the clients' clipped updates.

    Attributes
    ----------
    sample_rate : float
        q, with which each client whose turn it is is drawn into a round.
    noise_multiplier : float
        sigma, of all that a release tells: standard deviation by the norm that one client can change.
    update_noise_multiplier : float
        That of the sum of updates alone; above sigma where a noisy count is released beside it.
    count_noise : float
        Standard deviation of the noise on the count of unclipped updates; 0 where none is released.
    releases : int
        Noisy sums that the run releases: one for each exchange of a round, or before the first.
    delta : float
    accountant : str
    bands : int
        Releases over which the noise is correlated; into as many groups clients are divided, which take turns.
    """

    sample_rate: float
    noise_multiplier: float
    update_noise_multiplier: float
    count_noise: float
    releases: int
    delta: float
    accountant: str
    bands: int = 1

    def charged(self, releases: int) -> int:
        """Return how many steps so many releases cost: the turns of the clients that come first."""
        return -(-releases // self.bands)

    def expected(self, clients: int) -> float:
        """Return how many clients a release is expected to hold."""
        return self.sample_rate * clients / self.bands


COUNT_NOISE = 0.05
"""Noise on the count of unclipped updates, as a share of the clients that a round expects (Andrew et al. 2021)."""


def plan_server(config: Config, clients: int) -> ServerPlan:
    """Calibrate the server's noise for all rounds of the run.

    Parameters
    ----------
    config : Config
        With ``privacy.mode = "client"``.
    clients : int
        N, the number of clients (treated as public).

    Raises
    ------
    InputError
        If delta >= 1 / N, no noise reaches the target epsilon, the noise that was given has no finite epsilon, or
        clients are too few for a noisy count of them or for as many groups as there are bands.

    Notes
    -----
    With adaptive clipping a round releases a sum of updates, of noise z_u, and a count of the unclipped ones, of noise
    s. Together they are one Gaussian release of noise z with z^-2 = z_u^-2 + (2 s)^-2 (Andrew et al. 2021, arXiv
    1905.03871, theorem 1).

    With b bands, the n releases are ceil(n / b) steps for a client: its turns (:mod:`fedlora.privacy.banded`).
    """
    privacy, method = config.privacy, get_method(config.method.name)
    if privacy.target_delta >= 1 / clients:
        remedy = f"must be below 1 / N = {1 / clients:.3g} for {clients} clients; lower it"
        raise InputError("privacy.target_delta", privacy.target_delta, remedy)
    bands = privacy.groups
    if bands > clients:
        remedy = f"divides {clients} clients into more groups than there are clients; lower it"
        raise InputError("privacy.bands", privacy.bands, remedy)
    rate = privacy.group_rate(float(config.server.fraction_train))
    releases = sum(len(method.exchanges_of(config, r)) for r in range(config.run.rounds + 1))
    sigma = _noise(privacy, rate, -(-releases // bands))
    updates, count = sigma, 0.0
    if privacy.adaptive_clipping:
        count = COUNT_NOISE * rate * clients
        if sigma and sigma >= 2 * count:
            remedy = f"needs more clients: a noise multiplier of {sigma:.3g} leaves no room for their noisy count"
            remedy = f"{remedy} among {rate * clients:g} a round; leave it out"
            raise InputError("privacy.adaptive_clipping", True, remedy)
        updates = (sigma**-2 - (2 * count) ** -2) ** -0.5 if sigma else 0.0
        count = count if sigma else 0.0
    delta, accountant = privacy.target_delta, privacy.accountant
    return ServerPlan(rate, sigma, updates, count, releases, delta, accountant, bands)


@lru_cache(maxsize=65536)
def noise_multiplier(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str,
    spent: History = (),
    tolerance: float = 1e-3,
    group: int = 1,
) -> float:
    """Smallest sigma, to a share ``tolerance``, whose ``steps`` Poisson-sampled Gaussian steps stay within epsilon.

    ``spent`` are other steps (noise multiplier, sample rate, number) that epsilon has to cover too, and ``group`` is
    the most examples of a protected unit in a step. Sigma is at least ``MIN_NOISE``, however large epsilon is.

    Notes
    -----
    Opacus' ``get_noise_multiplier`` stops at an absolute tolerance of 0.01 in epsilon, a tenth of a small budget, and
    searches among values where one of its accountants does not come back.

    Raises
    ------
    InputError
        If no noise up to ``MAX_NOISE`` reaches epsilon.
    """
    low, high = 0.0, math.inf
    asked, accountant = accountant, get_accountant(accountant).for_calibration(epsilon)

    def total(sigma: float) -> float:
        """Epsilon; of a sigma that was tried before it is remembered."""
        return spent_epsilon(accountant, delta, (*spent, steps_of(sigma, sample_rate, steps, group)))

    def attempt(sigma: float) -> None:
        nonlocal low, high
        if total(sigma) > epsilon:
            low = max(low, sigma)
        else:
            high = min(high, sigma)

    def sigma_by(other: str, tolerance: float) -> float:
        return noise_multiplier(epsilon, delta, sample_rate, steps, other, spent, tolerance, group)

    for sigma in get_accountant(accountant).first_guesses(epsilon, total, sigma_by):
        attempt(sigma)
    while math.isinf(high):
        if low >= MAX_NOISE:
            tried = [*(2.0**k for k in range(int(math.log2(MAX_NOISE)) + 1)), MAX_NOISE]
            reached = (spent_epsilon(asked, delta, (*spent, steps_of(s, sample_rate, steps, group))) for s in tried)
            raise _unreached(epsilon, asked, min(reached))
        attempt(min(2 * low or 1.0, MAX_NOISE))
    while high - low > tolerance * high and high > MIN_NOISE:
        attempt((low + high) / 2)
    return max(high, MIN_NOISE)


@lru_cache(maxsize=65536)
def spent_epsilon(accountant: str, delta: float, history: tuple[Steps, ...]) -> float:
    """Epsilon of steps as a ledger holds them, by the accountant of a name.

    Every question has an answer, after a few seconds at most: steps that were taken must be counted. A noise multiplier
    below ``MIN_NOISE`` counts as no noise. Clients of like histories share one computation.
    """
    if not history:
        return 0.0
    if any(entry[0] < MIN_NOISE for entry in history):
        return math.inf
    # The bound of less noise holds for more.
    groups: GroupHistory = tuple((min(e[0], 10 * MAX_NOISE), e[1], e[2], group_of(e)) for e in history)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if any(group > 1 for *_, group in groups):
            return get_accountant(accountant).group_epsilon(delta, groups)
        return get_accountant(accountant).epsilon(delta, tuple(entry[:3] for entry in groups))
