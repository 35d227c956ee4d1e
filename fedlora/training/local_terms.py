"""Terms of a client's local objective that depend on no example: FedProx's, and linear ones of a correction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def add_local_terms(
    optimizer: torch.optim.Optimizer,
    start: Sequence[torch.Tensor],
    mu: float,
    shifts: Sequence[torch.Tensor | None] = (),
) -> None:
    """Let every step of an optimiser add the gradients of the terms to those of the loss.

    They are added right before the step: after a batch's gradient was clipped, and under DP after the noise. A term
    reads what the client released and no example, so that DP-SGD's epsilon stays what it is.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Over the trained parameters, each [K, ...].
    start : sequence of Tensor [K, ...]
        What each client began the round with, parameter by parameter.
    mu : float
        Of the proximal term mu/2 |w - w_start|^2 (FedProx, arXiv 1812.06127); 0 for none. Arrays that stay with a
        client start from its own.
    shifts : sequence of Tensor [K, ...] or None
        What is added to each client's gradients, parameter by parameter; None, or an empty sequence, for nothing.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shifts = shifts or [None] * len(parameters)
    if not mu and all(shift is None for shift in shifts):
        return

    def add(*_: Any) -> None:
        for p, before, shift in zip(parameters, start, shifts, strict=True):
            if p.grad is None:
                continue
            if mu:
                p.grad.add_(p.detach() - before, alpha=mu)
            if shift is not None:
                p.grad.add_(shift)

    optimizer.register_step_pre_hook(add)
