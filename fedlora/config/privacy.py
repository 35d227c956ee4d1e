"""``[privacy]``: differential privacy, and the ranges in which it means something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from fedlora.config.section import Section
from fedlora.errors import InputError
from fedlora.registry import ACCOUNTANTS, MECHANISMS

if TYPE_CHECKING:
    from fedlora.config.schema import Config

MIN_NOISE, MAX_NOISE = 0.01, 1e4
"""Noise multipliers: with less a step has epsilon above 4,000; with more, less than accountants resolve."""
MIN_DELTA = 1e-12
"""The tails of noise that is made of numbers of 32 to 64 bits end, at 7 to 10 standard deviations."""
MAX_EPSILON = 1000.0
MAX_CLIP = 1e6


class PrivacySection(Section):
    """``[privacy]``: differential privacy; names follow Opacus.

    With mode example the values have ranges for which epsilon can be computed and means something.
    """

    mode: Annotated[str, AfterValidator(MECHANISMS.check)] = Field(
        default="none",
        description="What is protected: nothing, one example of one client, or with client a whole client.",
    )
    target_epsilon: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Epsilon that no client may exceed over the whole run; noise is calibrated to it."
    )
    noise_multiplier: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="Standard deviation of the noise, in units of max_grad_norm or clipping_norm, instead of "
        "target_epsilon; 0 trains without noise, which has no epsilon.",
    )
    target_delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-5,
        description="Delta, which must be below 1 / n for a client of n examples; with mode client for n clients.",
    )
    # Noise in proportion to a norm that float32 hardly holds is rounded to 0.
    max_grad_norm: Annotated[float, Field(ge=1e-6)] = Field(
        default=1.0, description="Norm to which each example's gradient is clipped."
    )
    clipping_norm: Annotated[float, Field(ge=1e-6, le=MAX_CLIP)] = Field(
        default=1.0,
        description="With mode client, the norm to which each client's update is clipped; with adaptive_clipping that "
        "of the first round.",
    )
    noise: Literal["central", "distributed", "local"] = Field(
        default="central",
        description="With mode client, who adds the noise: the server, to the sum; each client its share of it, under "
        "server.secure_aggregation (distributed); or each client all of it (local), for comparison.",
    )
    adaptive_clipping: bool = Field(
        default=False,
        description="With mode client, let the norm follow the clients' updates: after each round it moves towards the "
        "norm that clipping_quantile of them are below. Their noisy count is part of epsilon.",
    )
    clipping_quantile: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="Share of the updates that adaptive clipping leaves as they are."
    )
    accountant: Annotated[str, AfterValidator(ACCOUNTANTS.check)] = Field(
        default="rdp", description="How epsilon is computed from the steps that were taken."
    )

    def check(self, config: Config) -> None:
        """Refuse values for which no accountant has an answer, or none that means anything."""
        if self.mode == "none":
            return
        epsilon, sigma = self.target_epsilon, self.noise_multiplier
        if epsilon is not None and sigma is not None:
            given = f"{epsilon} and noise_multiplier = {sigma}"
            raise InputError("privacy.target_epsilon", given, "give one of the two; the other follows from it")
        if epsilon is None and sigma is None:
            raise InputError("privacy.target_epsilon", None, f"is required with mode {self.mode} (or noise_multiplier)")
        if epsilon is not None and epsilon > MAX_EPSILON:
            remedy = "promises nothing, since exp(epsilon) is no number any more; give at most"
            raise InputError("privacy.target_epsilon", epsilon, f"{remedy} {MAX_EPSILON:g}, or mode none")
        if sigma is not None and 0 < sigma < MIN_NOISE:
            remedy = "is too little for any epsilon that means something; give at least"
            raise InputError("privacy.noise_multiplier", sigma, f"{remedy} {MIN_NOISE:g}, or 0 for no noise")
        if sigma is not None and sigma > MAX_NOISE:
            remedy = f"leaves nothing to learn from, and less epsilon than can be computed; give at most {MAX_NOISE:g}"
            raise InputError("privacy.noise_multiplier", sigma, remedy)
        if self.target_delta < MIN_DELTA:
            remedy = f"is smaller than the tails of computed noise allow to promise; give at least {MIN_DELTA:g}"
            raise InputError("privacy.target_delta", self.target_delta, remedy)
        if self.max_grad_norm > MAX_CLIP:
            remedy = f"clips nothing, and noise in proportion to it may overflow; give at most {MAX_CLIP:g}"
            raise InputError("privacy.max_grad_norm", self.max_grad_norm, remedy)
        MECHANISMS.made(self.mode).check(config)

    def unused(self, config: Config) -> Iterator[tuple[str, str]]:
        """Without privacy nothing of it counts; each mode clips what it protects."""
        clipping = "clipping_norm noise adaptive_clipping clipping_quantile"
        if self.mode == "none":
            keys = f"target_epsilon noise_multiplier target_delta max_grad_norm accountant {clipping}"
            yield keys, "privacy.mode is none"
            return
        mechanism = MECHANISMS.get(self.mode)
        if mechanism.noise_by != "server":
            yield clipping, f"privacy.mode is {self.mode}"
        else:
            if not self.adaptive_clipping:
                yield "clipping_quantile", "privacy.adaptive_clipping is false"
            if not mechanism.clips_examples:
                yield "max_grad_norm", f"privacy.mode is {self.mode}, which clips clients' updates"
