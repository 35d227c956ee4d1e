"""The wire is typed: named arrays of one declared dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

Arrays = dict[str, torch.Tensor]


def encode(arrays: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> ArrayRecord:
    """Turn named tensors into a Flower ArrayRecord of one dtype (numpy has no bfloat16, so that cannot be it)."""
    return ArrayRecord({name: Array(a.detach().cpu().to(dtype).contiguous().numpy()) for name, a in arrays.items()})


def decode(record: ArrayRecord) -> Arrays:
    """Turn a Flower ArrayRecord into named CPU tensors."""
    return {name: torch.from_numpy(np.asarray(array.numpy(), order="C")) for name, array in record.items()}


def digest(arrays: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values: equal only for bit-equal arrays."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        value = arrays[name].detach().cpu().contiguous().numpy()
        sha.update(f"{name} {value.dtype} {value.shape}\n".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()


def wire_dtype(model_dtype: str) -> torch.dtype:
    """Return the dtype in which a model's arrays travel: float32, or float64 for a float64 model."""
    return torch.float64 if model_dtype == "float64" else torch.float32


def payload_bytes(record: ArrayRecord) -> int:
    """Bytes of a record's numbers alone: elements times the size of their dtype."""
    return sum(int(np.prod(array.shape, dtype=np.int64)) * np.dtype(array.dtype).itemsize for array in record.values())
