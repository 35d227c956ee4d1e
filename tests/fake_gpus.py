"""Graphics cards in name, on which training runs out of memory as told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.adapters import AdaptedModel
from fedlora.training import cohort
from fedlora.training.checkpointing import layers_of

BASE, ROW, CHECKPOINTED = 50, 40, 10
"""Bytes of a model, of a row of a pass, and of one with checkpointing."""


class FakeGPUs:
    """Two cards; the second has a model's weights as the first, and half as much of a pass.

    Parameters
    ----------
    patch : pytest.MonkeyPatch
    free : int
        Bytes of each card beside the model.

    Attributes
    ----------
    passes : list of (int, bool)
        Rows of each pass that fitted, and whether checkpointing was on.
    """

    def __init__(self, patch: pytest.MonkeyPatch, free: int) -> None:
        self.free, self.passes, self._largest = free, list[tuple[int, bool]](), 0
        losses = cohort._losses

        def take(adapted: AdaptedModel, table: Any, rows: list[Any], pack_to: int | None) -> torch.Tensor:
            on = layers_of(adapted)[0].gradient_checkpointing
            number = sum(map(len, rows))
            needed = number * (CHECKPOINTED if on else ROW)
            if needed > self.free:
                raise torch.cuda.OutOfMemoryError("out of memory")
            self.passes.append((number, on))
            self._largest = max(self._largest, needed)
            return losses(adapted, table, rows, pack_to)

        patch.setattr(cohort, "_losses", take)
        patch.setattr("fedlora.training.passes.in_force", lambda _: True)
        patch.setattr("fedlora.training.capacity.SHARE", 1.0)
        patch.setattr(AdaptedModel, "devices", [torch.device("cpu", 0), torch.device("cpu", 1)])
        for name, function in {
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda _: self._forget(),
            "max_memory_allocated": lambda card: BASE + self._largest // (1 + card.index),
            "mem_get_info": lambda _: (self.free, 0),
            "memory_allocated": lambda _: BASE,
        }.items():
            patch.setattr(torch.cuda, name, function)

    def _forget(self) -> None:
        self._largest = 0
