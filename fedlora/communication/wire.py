"""The wire is typed: named arrays of one declared dtype."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy

from fedlora.alignment import aligned

Arrays = dict[str, torch.Tensor]


def encode(arrays: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> ArrayRecord:
    """Turn named tensors into a Flower ArrayRecord of one dtype (numpy has no bfloat16, so that cannot be it)."""
    if not arrays:
        return ArrayRecord()
    # Adapters are many small arrays: one conversion for all, and a copy of a record that Flower has checked before.
    flat = torch.cat([array.detach().cpu().reshape(-1) for array in arrays.values()]).to(dtype).numpy()
    record: ArrayRecord = pickle.loads(_blank(flat.dtype, tuple((n, tuple(a.shape)) for n, a in arrays.items())))
    numbers, start = flat.view(np.uint8), 0
    for array in record.values():
        end = start + math.prod(array.shape) * flat.itemsize
        array.data, start = b"".join((array.data, numbers[start:end].data)), end
    return record


def flatten(arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return all numbers of named arrays as one vector, in the arrays' order."""
    return torch.cat([array.reshape(-1) for array in arrays.values()]) if arrays else torch.empty(0)


def decode(record: ArrayRecord) -> Arrays:
    """Turn a Flower ArrayRecord into named CPU tensors, aligned.

    Raises
    ------
    ValueError
        If an array's bytes are not those of a numeric numpy array.
    """
    try:
        return {name: aligned(torch.from_numpy(_decode(array))) for name, array in record.items()}
    except (TypeError, EOFError) as error:
        raise ValueError(f"an array cannot be read: {error}") from None


def decode_vector(record: ArrayRecord) -> tuple[dict[str, tuple[int, ...]], torch.Tensor]:
    """Turn a Flower ArrayRecord into the shapes of its arrays, by name, and all their numbers as one vector.

    The same as :func:`decode` and :func:`flatten`, without a tensor for each of many small arrays.

    Raises
    ------
    ValueError
        As :func:`decode`.
    """
    shapes, parts, dtypes = {}, [], set()
    for name, array in record.items():
        plain = _plain(array)
        if plain is None:
            break
        start, shapes[name], dtype = plain
        parts.append(memoryview(array.data)[start:])
        dtypes.add(dtype)
    if len(parts) == len(record) and len(dtypes) == 1:
        numbers = bytearray().join(parts)  # writable, as torch wants it
        try:
            return shapes, torch.from_numpy(np.frombuffer(numbers, dtypes.pop()))
        except TypeError as error:
            raise ValueError(f"an array cannot be read: {error}") from None
    arrays = decode(record)
    return {name: tuple(array.shape) for name, array in arrays.items()}, flatten(arrays)


# Flower's Array holds a .npy file: a short header, then the numbers. numpy's own functions print and parse the header
# anew each time, which takes ten times as long as the copy for the small arrays that adapters are.


@lru_cache(maxsize=64)
def _blank(dtype: np.dtype, layout: tuple[tuple[str, tuple[int, ...]], ...]) -> bytes:
    """Return a pickled record whose arrays are headers alone."""
    record = ArrayRecord()
    for name, shape in layout:
        file = io.BytesIO()
        npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
        record[name] = Array(str(dtype), shape, "numpy.ndarray", file.getvalue())
    return pickle.dumps(record, pickle.HIGHEST_PROTOCOL)


@lru_cache(maxsize=1024)
def _layout(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    return npy.read_array_header_1_0(io.BytesIO(header[8:]))


def _plain(array: Array) -> tuple[int, tuple[int, ...], np.dtype] | None:
    """Return where an array's numbers start, its shape and dtype; None where numpy itself must read it."""
    data = array.data
    if array.stype != "numpy.ndarray" or data[:8] != b"\x93NUMPY\x01\x00":
        return None
    start = 10 + int.from_bytes(data[8:10], "little")
    shape, fortran_order, dtype = _layout(data[:start])
    if dtype.hasobject or len(data) - start != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{len(data) - start} bytes are no array of shape {shape} and dtype {dtype}")
    return None if fortran_order else (start, shape, dtype)


def _decode(array: Array) -> np.ndarray:
    plain = _plain(array)
    if plain is None:
        return np.ascontiguousarray(array.numpy())
    start, shape, dtype = plain
    return np.frombuffer(array.data, dtype, offset=start).reshape(shape).copy()


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
    return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in record.values())
