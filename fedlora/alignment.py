"""Memory at multiples of 64 bytes, on which equal bits on the CPU rest.

On some processors a product of matrices is summed in an order that depends on where its operands lie modulo 64 bytes.
torch's own allocations lie at multiples of 64. Tensors that it maps from a file, or takes over from numpy, lie
anywhere, and so do views; what is to give the same bits again is brought here first.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

ALIGNMENT = 64
"""Bytes."""

Model = TypeVar("Model", bound=nn.Module)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor itself where it begins at a multiple of :data:`ALIGNMENT` (or is on a GPU), else a copy."""
    if tensor.device.type != "cpu" or tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone()


def align_weights(model: Model) -> Model:
    """Bring all parameters and buffers of a model to multiples of :data:`ALIGNMENT`, in place, and return it."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = aligned(tensor.data)
    return model


def align_loaded(loaded: Any) -> Any:
    """Align what ``from_pretrained`` returns: a model, or a model and a report."""
    if isinstance(loaded, tuple):
        return (align_weights(loaded[0]), *loaded[1:])
    return align_weights(loaded)
