"""float16: half of float32's bytes, 11 bits of precision, and a range that ends at 65,504."""

from __future__ import annotations

import torch

from fedlora.communication.codecs import NumpyCodec


class Float16(NumpyCodec):
    """Two bytes a number. Larger numbers become infinite, so that the round's checks refuse them."""

    name = "float16"
    lossy = True
    unbiased = False
    wire = torch.float16
