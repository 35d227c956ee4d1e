"""Codecs of the wire, one file each: how named arrays become bytes, and how many."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord

from fedlora.alignment import aligned
from fedlora.arrays import Arrays
from fedlora.communication import wire
from fedlora.config import Config, WireSection
from fedlora.flower import unchecked_record
from fedlora.registry import CODECS

Shape = tuple[int, ...]


class Codec(ABC):
    """Turns named arrays into a Flower ArrayRecord and back. Stateless and deterministic.

    A subclass gives the bytes of one array (:meth:`pack`, :meth:`unpack`) and says how many they are
    (:meth:`payload_bytes`). Encoding a decoded array again must give the same bytes, because a resumed run sends
    decoded arrays. Numbers that are not finite must not become finite.

    Parameters
    ----------
    wire : WireSection, optional
        The keys that :attr:`uses` names, by default with their defaults.

    Attributes
    ----------
    name : str
        ``wire.codec``, and the name of the file.
    lossy : bool
        Whether float32 numbers change by encoding and decoding.
    unbiased : bool
        Whether a decoded number is right on average. A biased codec of updates needs error feedback.
    updates_only : bool
        Whether it is too coarse for values. It then encodes updates (value after minus value before), whatever a
        method's roles say, and is not used on the downlink. Its error must have a smaller Euclidean norm than the
        update, so that error feedback stays bounded.
    uses : tuple of str
        Keys of ``[wire]`` that it reads.
    dtype : torch.dtype
        Of decoded numbers.
    """

    name: ClassVar[str]
    lossy: ClassVar[bool]
    unbiased: ClassVar[bool]
    updates_only: ClassVar[bool] = False
    uses: ClassVar[tuple[str, ...]] = ()
    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, wire: WireSection | None = None) -> None:
        self.options = wire or WireSection()

    @abstractmethod
    def payload_bytes(self, shape: Shape) -> int:
        """Return the bytes of an array of a shape: the formula that measured bytes are held against."""

    @abstractmethod
    def pack(self, array: torch.Tensor) -> bytes:
        """Return the bytes of an array on the CPU, of :attr:`dtype`."""

    @abstractmethod
    def unpack(self, data: memoryview, shape: Shape) -> torch.Tensor:
        """Undo :meth:`pack`; ``data`` is not trusted, but has the right length."""

    def encode(self, arrays: Mapping[str, torch.Tensor]) -> ArrayRecord:
        """Turn named tensors into a record that Flower can send."""
        if not arrays:
            return ArrayRecord()
        # Adapters are many small arrays: one conversion for all, and none of Flower's checks of each.
        flat = torch.cat([array.detach().cpu().reshape(-1) for array in arrays.values()]).to(self.dtype)
        shapes = [tuple(array.shape) for array in arrays.values()]
        made = zip(arrays, shapes, self.pack_all(flat, shapes), strict=True)
        return unchecked_record((name, self.name, shape, self._stype, data) for name, shape, data in made)

    def decode(self, record: ArrayRecord) -> Arrays:
        """Turn a record that says its own names and shapes into tensors, aligned.

        Raises
        ------
        ValueError
            If the bytes are not what :meth:`encode` makes of such arrays.
        """
        shapes = {name: tuple(array.shape) for name, array in record.items()}
        if any(size < 0 for shape in shapes.values() for size in shape):
            raise ValueError("an array cannot be read: a size is negative")
        return {n: aligned(a) for n, a in named(self.decode_vector(record, shapes), shapes).items()}

    def decode_vector(self, record: ArrayRecord, shapes: Mapping[str, Shape]) -> torch.Tensor:
        """Turn a record that is not trusted into one vector, if it holds exactly what was asked for.

        Parameters
        ----------
        record : ArrayRecord
        shapes : mapping of str to tuple of int
            Names and shapes of the arrays that must be there, and no other.

        Returns
        -------
        Tensor [n]
            The numbers in the order of ``shapes``; the caller's own.

        Raises
        ------
        ValueError
            If names, shapes or the codec are others, or bytes lack.
        """
        wire.check_names(record, shapes)
        parts = [torch.empty(0, dtype=self.dtype)]
        for name, shape in shapes.items():
            array = record[name]
            if tuple(array.shape) != shape:
                raise ValueError(f"{name} has shape {wire.shown(array.shape)}, expected {shape}")
            if array.stype != self._stype:
                raise ValueError(f"{name} is encoded as {wire.shown(array.stype)}, expected {self._stype}")
            if len(array.data) != self.payload_bytes(shape):
                raise ValueError(f"{name} has {len(array.data)} bytes, expected {self.payload_bytes(shape)}")
            if array.data:
                parts.append(self.unpack(memoryview(array.data), shape).reshape(-1))
        return torch.cat(parts)

    def pack_all(self, flat: torch.Tensor, shapes: Sequence[Shape]) -> Iterable[bytes]:
        """Yield the bytes of all arrays of a record, which lie one after the other in ``flat``."""
        for part, shape in zip(flat.split([math.prod(shape) for shape in shapes]), shapes, strict=True):
            yield self.pack(part.view(shape)) if part.numel() else b""

    @property
    def _stype(self) -> str:
        # Not numpy's: Flower's own strategies must refuse what they would misread.
        return f"fedlora.{self.name}"


class NumpyCodec(Codec):
    """Numbers of one numpy dtype, as .npy files, which every Flower strategy reads.

    Attributes
    ----------
    wire : torch.dtype
        On the wire.
    """

    wire: ClassVar[torch.dtype]

    def payload_bytes(self, shape: Shape) -> int:
        """Elements times the size of their dtype."""
        return math.prod(shape) * self.wire.itemsize

    def pack(self, array: torch.Tensor) -> bytes:
        """Return the numbers, without the header of a .npy file."""
        return array.to(self.wire).numpy().tobytes()

    def unpack(self, data: memoryview, shape: Shape) -> torch.Tensor:
        """Read the numbers."""
        numbers = np.frombuffer(bytearray(data), str(self.wire).removeprefix("torch."))
        return torch.from_numpy(numbers).to(self.dtype).view(shape)

    def encode(self, arrays: Mapping[str, torch.Tensor]) -> ArrayRecord:
        """Convert all arrays at once."""
        return wire.encode(arrays, self.wire)

    def decode(self, record: ArrayRecord) -> Arrays:
        """Read .npy files; numbers of a dtype that is not the codec's, as some Flower strategies make, keep it."""
        arrays = wire.decode(record)
        return {name: a.to(self.dtype) if a.dtype == self.wire else a for name, a in arrays.items()}

    def decode_vector(self, record: ArrayRecord, shapes: Mapping[str, Shape]) -> torch.Tensor:
        """Read them as one vector; no header is parsed."""
        return wire.decode_as(record, shapes, self.wire).to(self.dtype)


@dataclass(frozen=True)
class RunCodecs:
    """The codecs of a run.

    Attributes
    ----------
    down, up : Codec
        Of the arrays of a round, to and from clients.
    once : Codec
        Of frozen arrays: lossless, since server and clients must hold the same bits and factors stay orthonormal.
    updates : bool
        Whether arrays come up as updates where the method's table says value. The server adds what was sent to them,
        so that the method gets values.
    feedback : bool
        Whether clients keep what the codec loses of their updates, and add it to their next ones.
    """

    down: Codec
    up: Codec
    once: Codec
    updates: bool = False
    feedback: bool = False

    @property
    def notes(self) -> list[str]:
        """What a user should know of them."""
        if not self.updates or self.feedback or self.up.unbiased:
            return []
        return [f"wire.error_feedback is false: what {self.up.name} leaves out of an update is lost"]


def get_codec(name: str, wire: WireSection | None = None) -> Codec:
    """Return the codec of a name, with the keys of ``[wire]`` that it uses.

    It is the same object for equal keys. An InputError lists the names if there is none of that name.
    """
    kind: type[Codec] = CODECS.get(name)
    wire = wire or _DEFAULT
    key = kind, tuple(getattr(wire, used) for used in kind.uses)
    if key not in _made:
        _made[key] = kind(wire)
    return _made[key]


_DEFAULT = WireSection()
_made: dict[tuple[type[Codec], tuple[Any, ...]], Codec] = {}


def run_codecs(config: Config) -> RunCodecs:
    """Return the codecs of a config.

    By default nothing is rounded: float32, in which half-precision models are trained too, or float64 of a float64 one.
    """
    lossless, wire = "float64" if config.model.dtype == "float64" else "float32", config.wire
    both = wire.codec or lossless
    return RunCodecs(
        down=get_codec(wire.downlink_codec or both, wire),
        up=get_codec(wire.uplink_codec or both, wire),
        once=get_codec(lossless, wire),
        updates=wire.sends_updates,
        feedback=wire.keeps_errors,
    )


def recode(record: ArrayRecord, source: Codec, target: Codec) -> ArrayRecord:
    """Turn a record of one codec into another's.

    Raises
    ------
    ValueError
        If the record is none of its codec's.
    """
    return record if source is target else target.encode(source.decode(record))


def named(vector: torch.Tensor, shapes: Mapping[str, Shape]) -> Arrays:
    """Return the arrays that lie one after the other in a vector, as views."""
    parts = vector.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
