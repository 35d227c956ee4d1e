"""One loss per example, so that a client's loss, and an example's gradient, do not depend on its neighbours."""

from __future__ import annotations

import torch
from torch.nn import functional


def per_example_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each example.

    Parameters
    ----------
    logits : Tensor [N, classes] or [N, T, vocabulary]
    labels : Tensor [N] or [N, T]
        For language models the tokens themselves, -100 where no loss is taken; position t predicts token t + 1.

    Returns
    -------
    Tensor [N]
        In nats; for language models the mean over the example's own target tokens, so that every example weighs the
        same, as the clipping of DP-SGD assumes.
    """
    if labels.dim() == 1:
        return functional.cross_entropy(_upcast(logits), labels, reduction="none")
    losses, counts = token_losses(logits, labels)
    return losses / counts.clamp(min=1)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each example's summed token cross-entropy [N] in nats, and its number of target tokens [N]."""
    targets = labels[:, 1:]
    chosen = targets != -100
    if logits.is_cuda:
        # Choosing positions would wait for the GPU to count them.
        flat = _upcast(logits[:, :-1]).flatten(0, 1)
        every = functional.cross_entropy(flat, targets.flatten(), reduction="none", ignore_index=-100)
        return every.reshape(targets.shape).sum(1), chosen.sum(1)
    # Only target positions meet the vocabulary-sized softmax: prompts and padding would be most of its work.
    losses = functional.cross_entropy(_upcast(logits[:, :-1][chosen]), targets[chosen], reduction="none")
    summed = torch.zeros(targets.shape, dtype=losses.dtype, device=losses.device)
    summed = summed.masked_scatter(chosen, losses)
    return summed.sum(1), chosen.sum(1)


def _upcast(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
