"""One example of one client, or one person with all its examples there: DP-SGD on every client."""

from __future__ import annotations

from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.methods import Method
from fedlora.privacy.calibration import PrivacyPlan, plan_privacy
from fedlora.privacy.mechanisms import LOCAL_SPENT, Mechanism


class Example(Mechanism):
    """Clients clip each example's gradient and add noise to the sum, calibrated for the whole run.

    With ``privacy.unit`` a person is protected, in one of two ways (Charles et al. 2024, arXiv 2407.07737): persons are
    sampled and their mean gradients clipped (uls), or examples are, of at most k a person, and the noise covers the
    Binomial(k, q) of them that are in a step together (els).
    """

    name = "example"
    unit = "one example of one client"
    noise_by = "client"
    clips_examples = True
    reply_metrics = LOCAL_SPENT

    def protects(self, config: Config) -> str:
        """Name the column of the persons, where they are protected."""
        unit = config.privacy.unit
        return self.unit if unit is None else f"one person ({unit}) with all its examples at one client"

    def check_method(self, method: type[Method], config: Config) -> None:
        """Refuse a start that draws single examples where persons are protected."""
        if config.privacy.unit is not None and method.start_examples(config):
            remedy = f"is not protected by {method.name}'s start, which draws single examples of the clients"
            raise InputError("privacy.unit", config.privacy.unit, f"{remedy}; choose another start, or leave it out")

    def describe(self, config: Config) -> str:
        """Say what is clipped and noised."""
        privacy = config.privacy
        clipped, drawn = "each example's gradient", "each example"
        if privacy.samples_units:
            some = "" if privacy.examples_per_unit is None else f" of up to {privacy.examples_per_unit} examples"
            clipped, drawn = f"each person's mean gradient{some}", "each person"
        elif privacy.group > 1:
            drawn = f"each of up to {privacy.group} examples of a person"
        return (
            f"DP-SGD: clients clip {clipped} to max_grad_norm = {privacy.max_grad_norm:g}, and "
            f"add Gaussian noise to the sum; {drawn} enters a step with the sample rate"
        )

    def plan(self, config: Config, examples: int, units: int | None = None) -> PrivacyPlan:
        """Calibrate the client's noise."""
        return plan_privacy(config, examples, units)
