"""Which examples enter each local step of a client."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fedlora import entropy
from fedlora.data.units import rows_by_unit

DRAWS = 2**20
"""So many rows' chances are drawn at once: enough for many steps of a small client, and no more than memory has."""


def shuffled_batches(rows: np.ndarray, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    """Yield ``steps`` batches from epochs over shuffled rows; an epoch's last batch may be smaller."""
    order: torch.Tensor = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) == 0:
            order = torch.randperm(len(rows), generator=generator)
        yield rows[order[:batch_size].numpy()]
        order = order[batch_size:]


def poisson_batches(
    rows: np.ndarray, sample_rate: float, steps: int, generator: torch.Generator | None
) -> Iterator[np.ndarray]:
    """Yield ``steps`` batches, maybe empty ones, into which every row enters with probability ``sample_rate``.

    Without a generator the chances are the operating system's entropy.
    """
    # The same draws as Opacus' UniformWithReplacementSampler, which makes them one step at a time.
    block = max(1, DRAWS // len(rows))
    for first in range(0, steps, block):
        shape = min(block, steps - first), len(rows)
        if generator is None:
            draws = entropy.uniform(shape[0] * shape[1]).reshape(shape) < sample_rate
        else:
            draws = (torch.rand(shape, generator=generator) < sample_rate).numpy()
        for drawn in draws:
            yield rows[np.flatnonzero(drawn)]


def unit_batches(
    rows: np.ndarray,
    units: np.ndarray,
    sample_rate: float,
    steps: int,
    generator: torch.Generator | None,
    most: int | None = None,
) -> Iterator[np.ndarray]:
    """Yield ``steps`` batches, maybe empty ones, into which every unit enters with probability ``sample_rate``.

    Parameters
    ----------
    rows : ndarray of int
    units : ndarray of int
        The unit of each row.
    sample_rate : float
    steps : int
    generator : torch.Generator or None
        None for the operating system's entropy.
    most : int, optional
        At most so many rows of a unit, drawn anew in every step; all by default.

    Yields
    ------
    ndarray of int
        All rows of a unit follow each other.
    """
    members = rows_by_unit(rows, units)
    for drawn in poisson_batches(np.arange(len(members)), sample_rate, steps, generator):
        chosen = [_some(members[unit], most, generator) for unit in drawn]
        yield np.concatenate([np.empty(0, np.int64), *chosen])


def _some(rows: np.ndarray, most: int | None, generator: torch.Generator | None) -> np.ndarray:
    if most is None or len(rows) <= most:
        return rows
    chances = entropy.uniform(len(rows)) if generator is None else torch.rand(len(rows), generator=generator).numpy()
    return rows[np.sort(np.argsort(chances, kind="stable")[:most])]
