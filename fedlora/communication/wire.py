"""The wire is typed: named arrays of one declared dtype."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy

from fedlora.alignment import aligned
from fedlora.arrays import Arrays
from fedlora.flower import unchecked_record

COUNTED = "counted"
"""Key of a message's settings, where clients keep errors: the last round that a reply of its client entered; or 0."""

_NPY = "numpy.ndarray"
"""Flower's name for arrays that are .npy files."""


def encode(arrays: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> ArrayRecord:
    """Turn named tensors into a Flower ArrayRecord of one dtype (numpy has no bfloat16, so that cannot be it)."""
    if not arrays:
        return ArrayRecord()
    # Adapters are many small arrays: one conversion for all, and none of Flower's checks of each.
    flat = torch.cat([array.detach().cpu().reshape(-1) for array in arrays.values()]).to(dtype).numpy()
    kind, numbers, start, made = str(flat.dtype), flat.view(np.uint8), 0, []
    for name, array in arrays.items():
        shape = tuple(array.shape)
        end = start + math.prod(shape) * flat.itemsize
        made.append((name, kind, shape, _NPY, b"".join((_header(flat.dtype, shape), numbers[start:end].data))))
        start = end
    return unchecked_record(made)


def decode(record: ArrayRecord) -> Arrays:
    """Turn a Flower ArrayRecord into named CPU tensors, aligned.

    Raises
    ------
    ValueError
        If an array's bytes are not those of a numeric numpy array.
    """
    try:
        return {name: aligned(torch.from_numpy(_decode(array))) for name, array in record.items()}
    except Exception as error:  # numpy's reader of headers raises whatever Python's parser does
        raise ValueError(f"an array cannot be read: {error}") from None


def decode_as(record: ArrayRecord, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> torch.Tensor:
    """Turn a record that somebody else sent into one vector of its numbers, if it holds just what was asked for.

    No header is parsed: it must be, byte for byte, the one that arrays of this shape and dtype have. So nothing in it
    can raise, unpickle or allocate.

    Parameters
    ----------
    record : ArrayRecord
    shapes : mapping of str to tuple of int
        Names and shapes of the arrays that must be there, and no other.
    dtype : torch.dtype
        That they must have.

    Returns
    -------
    Tensor [n]
        The numbers in the order of ``shapes``.

    Raises
    ------
    ValueError
        If names, shapes or dtypes are others, or bytes lack.
    """
    check_names(record, shapes)
    kind, arrays = np.dtype(str(dtype).removeprefix("torch.")), dict(record.items())
    parts: list[bytes | memoryview] = []
    for name, shape in shapes.items():
        data, header = arrays[name].data, _header(kind, shape)
        if data.startswith(header) and len(data) - len(header) == kind.itemsize * math.prod(shape):
            parts.append(memoryview(data)[len(header) :])
        else:
            parts.append(_fortran_numbers(name, arrays[name], shape, kind))
    joined = bytearray().join(parts)  # writable, as torch wants it
    return torch.from_numpy(np.frombuffer(joined, kind)) if joined else torch.empty(0, dtype=dtype)


def _fortran_numbers(name: str, array: Array, shape: tuple[int, ...], kind: np.dtype) -> bytes:
    """Return the numbers of an array that is in Fortran's order, in C's. Raises as :func:`decode_as`."""
    header = _header(kind, shape, True)
    if not array.data.startswith(header) or len(array.data) - len(header) != kind.itemsize * math.prod(shape):
        if tuple(array.shape) != shape:
            raise ValueError(f"{name} has shape {shown(array.shape)}, expected {shape}")
        if array.dtype != str(kind):
            raise ValueError(f"{name} is of {shown(array.dtype)}, expected {kind}")
        raise ValueError(f"the bytes of {name} are not those of {kind} numbers of shape {shape}")
    numbers = memoryview(array.data)[len(header) :]
    return np.frombuffer(numbers, kind).reshape(shape, order="F").tobytes()


def check_names(record: ArrayRecord, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a ValueError that names an array which lacks, or which nobody asked for."""
    if record.keys() == shapes.keys():
        return
    for name in sorted(set(record) ^ set(shapes)):
        said = record[name].shape if name in record else None
        raise ValueError(f"{shown(name)} has shape {shown(said)}, expected {shapes.get(name)}")


def shown(said: object) -> str:
    """Return what somebody else said, fit for a line of a log."""
    text = ascii(said)[1:-1] if isinstance(said, str) else ascii(said)
    return text if len(text) <= 80 else text[:77] + "..."


# Flower's Array holds a .npy file: a short header, then the numbers. numpy's own functions print and parse the header
# anew each time, which takes ten times as long as the copy for the small arrays that adapters are.


@lru_cache(maxsize=1024)
def _header(dtype: np.dtype, shape: tuple[int, ...], fortran: bool = False) -> bytes:
    """Return the header of a .npy file; of Fortran's order only where that is another."""
    file = io.BytesIO()
    fortran = fortran and len(shape) > 1
    npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": fortran, "shape": shape})
    return file.getvalue()


_READERS = {b"\x01\x00": (2, npy.read_array_header_1_0), b"\x02\x00": (4, npy.read_array_header_2_0)}
"""By the version of a .npy file: bytes of its header's length, and the header's reader."""


@lru_cache(maxsize=1024)
def _layout(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    return _READERS[header[6:8]][1](io.BytesIO(header[8:]))


def _start(data: bytes) -> int:
    """Return where the numbers of a .npy file start; 0 where it is none."""
    if data[:8] == b"\x93NUMPY\x01\x00" and len(data) > 9:  # as almost all are
        return min(len(data), 10 + data[8] + 256 * data[9])
    width = _READERS.get(data[6:8], (0, None))[0] if data[:6] == b"\x93NUMPY" else 0
    return min(len(data), 8 + width + int.from_bytes(data[8 : 8 + width], "little")) if width else 0


def _decode(array: Array) -> np.ndarray:
    data = array.data
    start = _start(data)
    if array.stype != _NPY or not start:
        raise ValueError("its bytes are no .npy file")
    shape, fortran_order, dtype = _layout(data[:start])
    # The numbers must be there before memory is taken for them; pickled objects are never read.
    if dtype.hasobject or min(shape, default=0) < 0 or len(data) - start != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{len(data) - start} bytes are no array of shape {shape} and dtype {dtype}")
    numbers = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran_order else "C")
    return numbers.copy(order="C")


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
    """Bytes of a record's numbers alone, as they came: without the headers of .npy files."""
    return sum(len(array.data) - (_start(array.data) if array.stype == _NPY else 0) for array in record.values())
