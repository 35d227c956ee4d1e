"""Which examples enter each local step of a client."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler


def shuffled_batches(rows: np.ndarray, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    """Yield ``steps`` batches from epochs over shuffled rows; an epoch's last batch may be smaller."""
    order: torch.Tensor = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) == 0:
            order = torch.randperm(len(rows), generator=generator)
        yield rows[order[:batch_size].numpy()]
        order = order[batch_size:]


def poisson_batches(
    rows: np.ndarray, sample_rate: float, steps: int, generator: torch.Generator
) -> Iterator[np.ndarray]:
    """Yield ``steps`` batches into which every row enters on its own with probability ``sample_rate``; some may be empty."""
    sampler = UniformWithReplacementSampler(
        num_samples=len(rows), sample_rate=sample_rate, generator=generator, steps=steps
    )
    for chosen in sampler:
        yield rows[np.asarray(chosen, dtype=np.int64)]
