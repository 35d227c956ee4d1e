"""One example of one client: DP-SGD on every client."""

from __future__ import annotations

from fedlora.config import Config
from fedlora.privacy.calibration import PrivacyPlan, plan_privacy
from fedlora.privacy.mechanisms import LOCAL_SPENT, Mechanism


class Example(Mechanism):
    """Clients clip each example's gradient and add noise to the sum, calibrated for the whole run."""

    name = "example"
    unit = "one example of one client"
    noise_by = "client"
    clips_examples = True
    reply_metrics = LOCAL_SPENT

    def describe(self, config: Config) -> str:
        """Say what is clipped and noised."""
        return (
            f"DP-SGD: clients clip each example's gradient to max_grad_norm = {config.privacy.max_grad_norm:g}, and "
            "add Gaussian noise to the sum; each example enters a step with the sample rate"
        )

    def plan(self, config: Config, examples: int) -> PrivacyPlan:
        """Calibrate the client's noise."""
        return plan_privacy(config, examples)
