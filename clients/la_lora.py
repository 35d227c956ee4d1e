"""LA-LoRA's client half: steps that train one factor each, by smoothed gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from fedlora.adapters import AdaptedModel
from fedlora.clients.half import ClientHalf
from fedlora.config import Config
from fedlora.training import StepRule

WEIGHTS = (1, 4, 6, 4, 1)
"""Of the low-pass filter, before they are divided by their sum."""

_LONG_SIDE = {"lora_A": -1, "lora_B": -2}
"""The side of each factor that is not the rank, which the filter runs along."""


class AlternatingHalf(ClientHalf):
    """Trains the factors in turns."""

    def __init__(self, adapted: AdaptedModel, config: Config) -> None:
        super().__init__(adapted, config)
        options: Any = config.method
        self.rule = Alternating(options.smoothing)


class Alternating(StepRule):
    """The first step trains B, the second A, and so on; every step trains the head.

    Parameters
    ----------
    smoothing : bool
        Whether the factors' gradients are smoothed.
    """

    def __init__(self, smoothing: bool) -> None:
        self.smoothing = smoothing

    def trains(self, kind: str, step: int) -> bool:
        """Say whose turn it is."""
        waiting = "lora_B" if step % 2 else "lora_A"
        return kind != waiting

    def gradient(self, kind: str, gradient: torch.Tensor) -> torch.Tensor:
        """Smooth a factor's gradient [K, rows, columns] along its long side."""
        if not self.smoothing or kind not in _LONG_SIDE:
            return gradient
        return smoothed(gradient, _LONG_SIDE[kind])


def smoothed(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Run the low-pass filter along one of the last two axes of values [K, rows, columns]; edges are repeated."""
    lines = values.transpose(axis, -1)
    reach = len(WEIGHTS) // 2
    padded = functional.pad(lines, (reach, reach), mode="replicate")
    length = lines.shape[-1]
    total = sum(weight * padded[..., i : i + length] for i, weight in enumerate(WEIGHTS)) / sum(WEIGHTS)
    assert isinstance(total, torch.Tensor)
    return total.transpose(axis, -1).contiguous()
