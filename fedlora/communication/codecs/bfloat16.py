"""bfloat16: half of float32's bytes and all of its range, with 8 bits of precision."""

from __future__ import annotations

import math

import torch

from fedlora.communication.codecs import Codec, Shape


class BFloat16(Codec):
    """Two bytes a number, as raw bytes, since numpy has no bfloat16."""

    name = "bfloat16"
    lossy = True
    unbiased = False

    def payload_bytes(self, shape: Shape) -> int:
        """Two bytes a number."""
        return 2 * math.prod(shape)

    def pack(self, array: torch.Tensor) -> bytes:
        """Round to the nearest."""
        return array.bfloat16().view(torch.int16).numpy().tobytes()

    def unpack(self, data: memoryview, shape: Shape) -> torch.Tensor:
        """Read raw bytes."""
        return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).float().view(shape)
