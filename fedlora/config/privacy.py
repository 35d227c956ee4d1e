"""``[privacy]``: differential privacy, and the ranges in which it means something."""

from __future__ import annotations

import math
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


MAX_GROUP = 1000
"""Examples of a unit for which a step's mixture of Gaussians is computed."""
MAX_BANDS = 1000
"""Rounds over which noise is correlated: the server keeps the noise of so many."""


class PrivacySection(Section):
    """``[privacy]``: differential privacy; names follow Opacus.

    With mode example the values have ranges for which epsilon can be computed and means something.
    """

    mode: Annotated[str, AfterValidator(MECHANISMS.check)] = Field(
        default="none",
        description="What is protected: nothing (none), one example of one client, or with unit one person "
        "(example), or a whole client (client).",
    )
    unit: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="With mode example, column of the person (or device, patient, author) whose examples are protected "
        "together, as one unit; one example by default. Test and validation examples that are held out come from "
        "other persons than the training examples, in any mode. Nodes name their own column.",
    )
    user_mechanism: Literal["uls", "els"] = Field(
        default="uls",
        description="With unit, what is sampled and clipped: persons, each by the mean gradient of its examples (uls), "
        "or single examples, of at most examples_per_unit a person (els). fedlora study --dry-run says which of them "
        "needs less noise.",
    )
    examples_per_unit: Annotated[int, Field(ge=1, le=MAX_GROUP)] | None = Field(
        default=None,
        description="With uls, the maximum number of examples in a person's gradient, drawn anew in every step; all "
        "by default. With els, which requires it, the maximum number of a person's examples that a client trains on, "
        "the same in all rounds.",
    )
    target_epsilon: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Epsilon that no client may exceed over the whole run; noise is calibrated to it."
    )
    noise_multiplier: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="Standard deviation of the noise, in units of max_grad_norm or clipping_norm, instead of "
        "target_epsilon; 0 trains without noise, with an infinite epsilon.",
    )
    target_delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-5,
        description="Delta, which must be below 1 / n for a client of n examples, or with unit of n persons; with mode "
        "client for n clients.",
    )
    # Noise in proportion to a norm that float32 hardly holds is rounded to 0.
    max_grad_norm: Annotated[float, Field(ge=1e-6)] = Field(
        default=1.0, description="Norm to which each example's gradient is clipped, or with uls each person's."
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
    bands: Annotated[int, Field(ge=1, le=MAX_BANDS)] = Field(
        default=1,
        description="With mode client, over how many rounds the server's noise is correlated, so that much of it "
        "cancels in the models (banded matrix factorisation, DP-FTRL); with 1 it is independent. Clients are divided "
        "into as "
        "many groups, which take turns: fraction_train, of all clients, is 1 / bands at most.",
        json_schema_extra={"unit": "rounds"},
    )
    adaptive_clipping: bool = Field(
        default=False,
        description="With mode client, let the norm follow the clients' updates: after each round it moves towards the "
        "norm that clipping_quantile of them are below. Their noisy count is part of epsilon.",
    )
    clipping_quantile: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="Share of the updates that adaptive clipping leaves unclipped."
    )
    accountant: Annotated[str, AfterValidator(ACCOUNTANTS.check)] = Field(
        default="rdp", description="How epsilon is computed from the steps that were taken."
    )

    @property
    def samples_units(self) -> bool:
        """Whether a client's steps draw persons, and not examples."""
        return self.protects_units and self.user_mechanism == "uls"

    @property
    def protects_units(self) -> bool:
        """Whether a person's examples are protected together."""
        return self.mode == "example" and self.unit is not None

    @property
    def group_cap(self) -> int | None:
        """Most examples of a person on which a client trains; None where it trains on all."""
        return self.examples_per_unit if self.protects_units and self.user_mechanism == "els" else None

    @property
    def group(self) -> int:
        """Most examples of a protected unit that enter a step by themselves."""
        return self.group_cap or 1

    @property
    def groups(self) -> int:
        """How many groups of clients take turns: as many as the server's noise has bands, and 1 where it adds none."""
        return self.bands if MECHANISMS.get(self.mode).noise_by == "server" else 1

    def group_rate(self, fraction: float) -> float:
        """Return the share that is asked of the group whose turn it is, where it is a fraction of all clients."""
        rate = fraction * self.groups
        # A third is written with a few digits.
        return 1.0 if self.groups > 1 and math.isclose(rate, 1.0, rel_tol=1e-5) else rate

    def of_examples(self) -> PrivacySection:
        """Return of this section what decides which examples are read and held out, and who trains on them."""
        if self.unit is None:
            return PrivacySection()
        kept = self.model_dump(include={"mode", "unit", "user_mechanism", "examples_per_unit"})
        return PrivacySection.model_validate(kept if self.group_cap is not None else {"unit": self.unit})

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
        self._check_unit()
        MECHANISMS.made(self.mode).check(config)

    def _check_unit(self) -> None:
        """Refuse a unit that the mode, or the accountant, cannot protect."""
        if self.unit is None:
            return
        if self.mode != "example":
            remedy = 'is protected by clients, with mode = "example"; set that, or leave the unit out'
            raise InputError("privacy.unit", self.unit, remedy)
        if self.user_mechanism == "uls":
            return
        if self.examples_per_unit is None:
            remedy = 'is required with user_mechanism = "els": the most examples of a person, by which noise grows'
            raise InputError("privacy.examples_per_unit", None, remedy)
        if self.group > 1 and not ACCOUNTANTS.get(self.accountant).counts_groups:
            remedy = 'cannot count several examples of a person in a step; use rdp, or user_mechanism = "uls"'
            raise InputError("privacy.accountant", self.accountant, remedy)

    def unused(self, config: Config) -> Iterator[tuple[str, str]]:
        """Without privacy nothing of it counts; each mode clips what it protects."""
        if self.unit is None:
            yield "user_mechanism examples_per_unit", "privacy.unit names no persons"
        clipping = "clipping_norm noise bands adaptive_clipping clipping_quantile"
        if self.mode == "none":
            keys = f"target_epsilon noise_multiplier target_delta max_grad_norm accountant {clipping}"
            if self.unit is not None:
                keys = f"{keys} user_mechanism examples_per_unit"
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
