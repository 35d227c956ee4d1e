"""Memory at multiples of 64 bytes, on which equal bits on the CPU rest.

On some processors a product of matrices is summed in an order that depends on where its operands lie modulo 64 bytes.
torch's own allocations lie at multiples of 64. Tensors that it maps from a file, or takes over from numpy, lie
anywhere, and so do views; what is to give the same bits again is brought here first.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
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
    mapped: list[tuple[int, int]] | None = None
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            before = tensor.data
            tensor.data = aligned(before)
            first, size = _whole_pages(before)
            if tensor.data_ptr() != before.data_ptr() and size > 0:
                # A long list, which small models need not read.
                mapped = _mapped_weights() if mapped is None else mapped
                _unmap_pages(first, size, mapped)
    return model


def align_loaded(loaded: Any) -> Any:
    """Align what ``from_pretrained`` returns: a model, or a model and a report."""
    if isinstance(loaded, tuple):
        return (align_weights(loaded[0]), *loaded[1:])
    return align_weights(loaded)


def _mapped_weights() -> list[tuple[int, int]]:
    """Return where this process has mapped files of weights, as first address and the one behind; none but on Linux."""
    maps = Path("/proc/self/maps")
    if sys.platform != "linux" or not maps.exists():
        return []
    lines = [line.split(maxsplit=5) for line in maps.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = [line[0].split("-") for line in lines if len(line) == 6 and line[5].endswith(".safetensors")]
    return [(int(first, 16), int(behind, 16)) for first, behind in found]


def _whole_pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address and the bytes of the pages of memory that hold nothing but a tensor."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    return first, (tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE


def _unmap_pages(first: int, size: int, mapped: list[tuple[int, int]]) -> None:
    """Let go of pages of a file: what was copied would be in memory twice. They are read again if needed."""
    # Only of a file: other memory would be lost.
    if any(start <= first and first + size <= behind for start, behind in mapped):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
