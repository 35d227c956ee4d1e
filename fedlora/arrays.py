"""Named tensors: what clients train, what travels, what is averaged."""

from __future__ import annotations

import torch

Arrays = dict[str, torch.Tensor]
"""Arrays without a client axis: ``MODULE.FACTOR`` for adapters, ``MODULE.weight`` and ``MODULE.bias`` for the head."""
