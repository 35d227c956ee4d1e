"""Two ways to protect a person with many examples, and which of them needs less noise."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from fedlora.config import MAX_GROUP, Config
from fedlora.errors import InputError
from fedlora.privacy.calibration import PrivacyPlan, plan_privacy


@dataclass(frozen=True)
class UnitNoise:
    """The noise of one way to protect persons, for one client.

    Attributes
    ----------
    user_mechanism : str
    noise_multiplier : float
    batch_size : int
        Persons (uls) or examples (els) that a step expects.
    examples_per_unit : int or None
    effective_noise : float
        Standard deviation of the noise on the mean gradient of a step, in units of ``max_grad_norm``: the noise
        multiplier by the expected batch size.
    gradients : float
        Gradients of examples that a step computes, on average.
    """

    user_mechanism: str
    noise_multiplier: float
    batch_size: int
    examples_per_unit: int | None
    effective_noise: float
    gradients: float


def compare_units(config: Config, sizes: np.ndarray) -> list[UnitNoise]:
    """Compare user-level with example-level sampling for a client, at as many gradients a step.

    Parameters
    ----------
    config : Config
        With ``privacy.unit`` and ``privacy.target_epsilon``.
    sizes : ndarray of int
        Examples of each person of the client.

    Returns
    -------
    list of UnitNoise
        The config's own way first; the other only if it can be calibrated. Empty without persons, or without an epsilon
        to compare at.

    Notes
    -----
    As Charles et al. 2024 (arXiv 2407.07737) compare them: equal epsilon, steps and gradients, and the noise on the
    mean gradient. The clipping norm is the same for both, though a person's mean gradient is shorter than a single one
    where its examples differ, which speaks for uls beyond these figures. Where ``examples_per_unit`` is not given, els
    takes the median number of examples.
    """
    own, most = config.privacy.user_mechanism, config.privacy.examples_per_unit
    if not config.privacy.protects_units or config.privacy.target_epsilon is None:
        return []
    capped = sizes if most is None else np.minimum(sizes, most)
    each = float(capped.mean())
    gradients = config.client.batch_size * (each if own == "uls" else 1.0)
    other = "els" if own == "uls" else "uls"
    found = [_noise(config, own, config.client.batch_size, sizes, most)]
    limit = most or max(1, min(MAX_GROUP, round(float(np.median(sizes)))))
    batch = max(1, round(gradients if other == "els" else gradients / each))
    with suppress(InputError):
        found.append(_noise(config, other, batch, sizes, limit if other == "els" else most))
    return found


def _noise(config: Config, mechanism: str, batch: int, sizes: np.ndarray, most: int | None) -> UnitNoise:
    privacy = config.privacy.model_copy(update={"user_mechanism": mechanism, "examples_per_unit": most})
    client = config.client.model_copy(update={"batch_size": batch})
    capped = sizes if most is None else np.minimum(sizes, most)
    drawn = len(sizes) if mechanism == "uls" else int(capped.sum())
    plan: PrivacyPlan = plan_privacy(
        config.model_copy(update={"privacy": privacy, "client": client}), drawn, len(sizes)
    )
    expected = plan.expected_batch_size
    gradients = expected * (float(capped.mean()) if mechanism == "uls" else 1.0)
    return UnitNoise(mechanism, plan.noise_multiplier, batch, most, plan.noise_multiplier / expected, gradients)


def unit_advice(found: list[UnitNoise]) -> str:
    """Say in a line which way needs less noise; "" where there is nothing to compare."""
    if not found:
        return ""
    parts = []
    for one in found:
        some = "" if one.examples_per_unit is None else f", up to {one.examples_per_unit} examples each"
        drawn = f"{one.batch_size} persons{some}" if one.user_mechanism == "uls" else f"{one.batch_size} examples"
        if one.user_mechanism == "els":
            drawn += f", up to {one.examples_per_unit} of a person"
        parts.append(
            f"{one.user_mechanism} has {one.effective_noise:.3g} (noise multiplier {one.noise_multiplier:.4g}, {drawn})"
        )
    if len(found) == 1:
        return f"noise on a step's mean gradient, in clipping norms: {parts[0]}; the other way cannot keep this epsilon"
    less = min(found, key=lambda one: one.effective_noise).user_mechanism
    return f"noise on a step's mean gradient, in clipping norms: {', '.join(parts)}; {less} needs less"
