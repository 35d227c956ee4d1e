"""float32: the default."""

from __future__ import annotations

import torch

from fedlora.communication.codecs import NumpyCodec


class Float32(NumpyCodec):
    """Four bytes a number."""

    name = "float32"
    lossy = False
    unbiased = True
    wire = torch.float32
