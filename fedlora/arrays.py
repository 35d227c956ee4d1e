"""Named tensors: what clients train, what travels, what is averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Arrays = dict[str, torch.Tensor]
"""Arrays without a client axis: ``MODULE.FACTOR`` for adapters, ``MODULE.weight`` and ``MODULE.bias`` for the head."""


def leading(array: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the leading block of a shape: of a matrix its first rows and columns. A view."""
    return array[tuple(slice(size) for size in shape)]


def padded(array: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return an array of a larger shape that has this one as its leading block, and zeros elsewhere."""
    if tuple(array.shape) == tuple(shape):
        return array
    whole = array.new_zeros(tuple(shape))
    leading(whole, array.shape)[...] = array
    return whole
