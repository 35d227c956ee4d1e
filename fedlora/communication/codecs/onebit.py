"""onebit: the signs of an update and one scale an array, about a thirtieth of float32's bytes."""

from __future__ import annotations

import math

import numpy as np
import torch

from fedlora.communication.codecs import Codec, Shape

_SCALE = np.dtype("<f4")


class OneBit(Codec):
    """Every number as its sign times one float32 scale, the mean of the array's absolute values; 8 signs a byte.

    Among all multiples of the signs, this one is nearest to the array (Karimireddy et al., arXiv 1901.09847). The scale
    is of a whole array: rows of low-rank factors are as short as the rank, and a scale for each of 8 numbers would cost
    four times what their signs do.
    """

    name = "onebit"
    lossy = True
    unbiased = False
    updates_only = True

    def payload_bytes(self, shape: Shape) -> int:
        """A bit a number, in whole bytes, and four bytes an array; nothing of an empty one."""
        count = math.prod(shape)
        return -(-count // 8) + _SCALE.itemsize if count else 0

    def pack(self, array: torch.Tensor) -> bytes:
        """Return the scale, then the signs; 0 counts as positive."""
        numbers = array.reshape(-1).numpy()
        # In float64 the mean of equal float32 numbers is that number: what was decoded keeps its scale.
        scale = np.abs(numbers).mean(dtype=np.float64).astype(_SCALE)
        return scale.tobytes() + np.packbits(numbers >= 0).tobytes()

    def unpack(self, data: memoryview, shape: Shape) -> torch.Tensor:
        """Give each sign the scale.

        Raises
        ------
        ValueError
            If the scale is negative.
        """
        scale = np.frombuffer(data, _SCALE, 1)[0]
        if scale < 0:
            raise ValueError(f"the scale of an array is {scale}")
        positive = np.unpackbits(np.frombuffer(data, np.uint8, offset=_SCALE.itemsize), count=math.prod(shape))
        return torch.from_numpy(np.where(positive, scale, -scale).astype(np.float32)).view(shape)
