"""What a node's owner accepts, whatever config a server sends."""

from __future__ import annotations

from fedlora.errors import PolicyError
from fedlora.node.config import PolicySection
from fedlora.privacy import PrivacyPlan


def check_policy(policy: PolicySection, plan: PrivacyPlan | None) -> None:
    """Refuse a run whose privacy is weaker than the owner accepts; the ceiling is the ledger's to hold.

    Parameters
    ----------
    policy : PolicySection
    plan : PrivacyPlan, optional
        What the run's config comes to with this node's number of examples; None without privacy.

    Raises
    ------
    PolicyError
        Naming the owner's key, its value and what the run asks for.
    """
    if plan is None:
        if not policy.allow_non_private:
            raise PolicyError("allow_non_private", False, "privacy.mode = none")
        return
    # A start from the owner's examples releases something of them, as a step does.
    noise = min([plan.noise_multiplier, *(sigma for sigma, _, _ in plan.start)])
    rate = max([plan.sample_rate, *(rate for _, rate, _ in plan.start)])
    if policy.min_noise_multiplier is not None and noise < policy.min_noise_multiplier:
        raise PolicyError("min_noise_multiplier", policy.min_noise_multiplier, noise)
    if policy.max_grad_norm is not None and plan.max_grad_norm > policy.max_grad_norm:
        raise PolicyError("max_grad_norm", policy.max_grad_norm, plan.max_grad_norm)
    if policy.max_sample_rate is not None and rate > policy.max_sample_rate:
        raise PolicyError("max_sample_rate", policy.max_sample_rate, rate)
    if noise == 0 and not policy.allow_non_private:
        raise PolicyError("allow_non_private", False, "privacy.noise_multiplier = 0")
