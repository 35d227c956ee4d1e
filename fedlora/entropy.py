"""Random numbers made of the operating system's entropy, one by one: on a real node nobody can compute them.

A seeded generator of the CPU, as of torch or numpy, gives itself away: from numbers that were seen all others follow. A
server may choose arrays for which many gradients are 0, so that it sees their noise bare.
"""

from __future__ import annotations

import os

import numpy as np
import torch

_BLOCK = 2**20
"""So many numbers are drawn at once, whatever is asked for."""


def uniform(count: int) -> np.ndarray:
    """Draw ``count`` numbers of [0, 1), of 53 bits each."""
    return (np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(11)) * 2.0**-53


def normal(count: int) -> np.ndarray:
    """Draw ``count`` standard normal numbers in float64, by the method of Box and Muller.

    Notes
    -----
    With 64 bits for a radius the tails end at 9.5, beyond which less than 1e-19 of a normal distribution lies.
    """
    if count > _BLOCK:
        return np.concatenate([normal(min(_BLOCK, count - start)) for start in range(0, count, _BLOCK)])
    radius, angle = np.frombuffer(os.urandom(16 * -(-count // 2)), np.uint64).reshape(2, -1).astype(np.float64)
    radius = np.sqrt(-2 * np.log((radius + 0.5) * 2.0**-64))
    angle *= 2 * np.pi * 2.0**-64
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def fill_uniform(block: torch.Tensor) -> None:
    """Fill a tensor with numbers of [0, 1)."""
    block.copy_(torch.from_numpy(uniform(block.numel())).reshape(block.shape))


def fill_normal(block: torch.Tensor) -> None:
    """Fill a contiguous tensor with standard normal numbers."""
    for part in block.view(-1).split(_BLOCK):
        part.copy_(torch.from_numpy(normal(len(part))))
