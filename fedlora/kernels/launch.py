"""Where a kernel is launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def beside(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Launch kernels on the GPU of a tensor: Triton takes the current one, where a split model's layers need not be."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
