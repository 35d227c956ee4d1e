"""topk: the largest numbers of an update, each with its place."""

from __future__ import annotations

import math

import numpy as np
import torch

from fedlora.communication.codecs import Codec, Shape

_VALUE = np.dtype("<f4")


class TopK(Codec):
    """A fixed share of an array's numbers (``wire.topk_fraction``), the largest in absolute value; the rest is 0.

    Values are float32. Their places in the flattened array come in increasing order, in 1, 2 or 4 bytes each as the
    array's size needs. Of equal numbers the first are taken, so that what was decoded gives the same bytes again.
    """

    name = "topk"
    lossy = True
    unbiased = False
    updates_only = True
    uses = ("topk_fraction",)

    def payload_bytes(self, shape: Shape) -> int:
        """Four bytes a value, and the bytes of its place."""
        size = math.prod(shape)
        return self._count(size) * (_VALUE.itemsize + _place(size).itemsize)

    def pack(self, array: torch.Tensor) -> bytes:
        """Return the places, then the values."""
        numbers = array.reshape(-1)
        # NaN is larger than any number: it is sent, and refused.
        order = numbers.abs().argsort(descending=True, stable=True)
        places = order[: self._count(len(numbers))].sort().values
        values = numbers[places].numpy().astype(_VALUE)
        return places.numpy().astype(_place(len(numbers))).tobytes() + values.tobytes()

    def unpack(self, data: memoryview, shape: Shape) -> torch.Tensor:
        """Put the values in their places.

        Raises
        ------
        ValueError
            If a place is outside of the array, or places do not increase.
        """
        size = math.prod(shape)
        count, kind = self._count(size), _place(size)
        places = np.frombuffer(data, kind, count).astype(np.int64)
        if (np.diff(places) <= 0).any() or places[-1] >= size:
            raise ValueError(f"the places of {count} numbers do not increase, or leave an array of {size}")
        found = np.zeros(size, np.float32)
        found[places] = np.frombuffer(data, _VALUE, count, offset=count * kind.itemsize)
        return torch.from_numpy(found).view(shape)

    def _count(self, size: int) -> int:
        """How many of so many numbers are sent."""
        return max(1, round(self.options.topk_fraction * size)) if size else 0


def _place(size: int) -> np.dtype:
    """Return the smallest dtype that counts to below a size."""
    return np.dtype("<u1" if size <= 2**8 else "<u2" if size <= 2**16 else "<u4")
