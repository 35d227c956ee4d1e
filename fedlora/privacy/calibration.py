"""How much noise a client adds: once for all the steps that it could take, by its own sampling rate."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

from opacus.accountants.utils import get_noise_multiplier

from fedlora.config import Config, PrivacySection
from fedlora.errors import InputError


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
    """

    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    steps: int
    delta: float
    accountant: str
    ceiling: float | None


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
    if sigma is None:
        assert privacy.target_epsilon is not None
        sigma = noise_multiplier(privacy.target_epsilon, privacy.target_delta, rate, steps, privacy.accountant)
    return PrivacyPlan(
        sample_rate=rate,
        noise_multiplier=sigma,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=rate * examples,
        steps=steps,
        delta=privacy.target_delta,
        accountant=privacy.accountant,
        ceiling=privacy.target_epsilon,
    )


@lru_cache(maxsize=65536)
def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str) -> float:
    """Smallest sigma (to Opacus' tolerance) whose ``steps`` Poisson-sampled Gaussian steps stay within epsilon."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=steps,
                    accountant=accountant,
                )
            )
        except ValueError as error:
            raise InputError("privacy.target_epsilon", epsilon, f"cannot be reached ({error}); raise it") from None
