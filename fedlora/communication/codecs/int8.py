"""int8: about a quarter of float32's bytes, one scale for a row or several."""

from __future__ import annotations

import math

import numpy as np
import torch

from fedlora.communication.codecs import Codec, Shape

LEAST = 64
"""Fewest numbers that share a scale, in an array that has so many: scales then add at most a sixteenth of the bytes."""

_SMALLEST = torch.finfo(torch.float32).tiny


class Int8(Codec):
    """Numbers as multiples -127 to 127 of one float32 scale a group, the group's largest number / 127.

    A row, of the last dimension, is a group if it has :data:`LEAST` numbers. Shorter rows are put together: the fewest
    neighbouring ones that have so many numbers and divide the array evenly. A vector is one group. The error of a
    number is at most half the scale. Rounding is deterministic: changes far smaller than the scale are lost, unless
    updates are sent instead of values.
    """

    name = "int8"
    lossy = True
    unbiased = False

    def payload_bytes(self, shape: Shape) -> int:
        """One byte a number, and four a group."""
        return math.prod(shape) + 4 * _groups(shape)

    def pack(self, array: torch.Tensor) -> bytes:
        """Round each group to the nearest multiples of its scale."""
        rows = array.reshape(_groups(tuple(array.shape)), -1)
        scales = _coarse(rows.abs().amax(1) / 127)
        scales[scales < _SMALLEST] = 0
        steps = (rows / scales.clamp(min=_SMALLEST)[:, None]).nan_to_num().round()
        steps[scales == 0] = 0  # numbers below 127 times the smallest scale
        return scales.numpy().tobytes() + steps.clamp(-127, 127).to(torch.int8).numpy().tobytes()

    def unpack(self, data: memoryview, shape: Shape) -> torch.Tensor:
        """Multiply the steps by their scales."""
        count = _groups(shape)
        scales = torch.from_numpy(np.frombuffer(data, np.float32, count).copy())
        steps = torch.from_numpy(np.frombuffer(data, np.int8, offset=4 * count).copy())
        return (steps.view(count, -1).float() * scales[:, None]).view(shape)


def _groups(shape: Shape) -> int:
    """Return the number of scales of an array."""
    if not math.prod(shape):
        return 0
    rows, width = math.prod(shape[:-1]), shape[-1] if shape else 1
    fewest = -(-LEAST // width)
    return rows // next((together for together in range(fewest, rows) if rows % together == 0), rows)


def _coarse(scales: torch.Tensor) -> torch.Tensor:
    """Round scales up to 16 bits, so that 127 steps are exact in float32, and what is decoded has the same scales."""
    return ((scales.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)
