"""float64: the default of a float64 model."""

from __future__ import annotations

import torch

from fedlora.communication.codecs import NumpyCodec


class Float64(NumpyCodec):
    """Eight bytes a number."""

    name = "float64"
    lossy = False
    unbiased = True
    dtype = wire = torch.float64
