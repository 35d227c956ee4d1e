"""How a Message moves between processes on Ray: few large buffers, shared arrays once a round and worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Error, Message, Metadata, RecordDict

from fedlora.flower import from_bytes, to_bytes, unchecked_record, with_metadata

LARGE = 2**18
"""Bytes of an array from which it travels by itself; below, a copy costs less than Ray's bookkeeping of a buffer."""


@dataclass(frozen=True)
class PackedRecord:
    """An array record taken apart, so that Ray moves its bytes through shared memory.

    Attributes
    ----------
    layout : list of tuple
        Name, dtype, shape, stype and number of bytes of each array.
    small : np.ndarray [bytes]
        Of the arrays below :data:`LARGE`, one after the other.
    large : list of np.ndarray [bytes]
        Views of the others.
    """

    layout: list[tuple[str, str, tuple[int, ...], str, int]]
    small: np.ndarray
    large: list[np.ndarray]


@dataclass(frozen=True)
class SharedRecord:
    """Stands for an array record that several messages carry; ``key`` finds it among the shared ones."""

    key: int


@dataclass(frozen=True)
class Envelope:
    """A message taken apart; ``records`` is None for an error, ``notes`` are a worker's warnings on the way."""

    metadata: Metadata
    records: dict[str, Any] | None
    error: Error | None
    notes: tuple[str, ...] = ()

    @property
    def array_bytes(self) -> int:
        """Bytes of the arrays that travel with it."""
        packed = (record for record in (self.records or {}).values() if isinstance(record, PackedRecord))
        return sum(size for record in packed for *_, size in record.layout)


@dataclass(frozen=True)
class StoredContext:
    """A client's context, apart from its state, which is as it is stored; b"" for one that has none yet."""

    context: Context
    state: bytes

    def open(self) -> Context:
        """Return the context with its state."""
        return replace(self.context, state=from_bytes(self.state))

    def changed(self, context: Context) -> bytes | None:
        """Return the state of a context that :meth:`open` gave, to be stored; None where it is as it was."""
        state = to_bytes(context.state)
        return None if state == self.state else state


def pack_record(record: ArrayRecord) -> PackedRecord:
    """Take a record apart; what each array holds must be bytes."""
    layout = [(name, a.dtype, a.shape, a.stype, len(a.data)) for name, a in record.items()]
    small = b"".join([a.data for a in record.values() if len(a.data) < LARGE])
    large = [np.frombuffer(a.data, np.uint8) for a in record.values() if len(a.data) >= LARGE]
    return PackedRecord(layout, np.frombuffer(small, np.uint8), large)


def unpack_record(packed: PackedRecord) -> ArrayRecord:
    """Undo :func:`pack_record`."""
    small, large = packed.small.data, iter(packed.large)
    arrays, start = [], 0
    for name, dtype, shape, stype, size in packed.layout:
        if size < LARGE:
            data = small[start : start + size].tobytes()
            start += size
        else:
            data = next(large).tobytes()
        arrays.append((name, dtype, shape, stype, data))
    return unchecked_record(arrays)


def pack(message: Message, shared: Mapping[int, SharedRecord] | None = None) -> Envelope:
    """Take a message apart; array records whose ``id`` is in ``shared`` are replaced."""
    if not message.has_content():
        return Envelope(message.metadata, None, message.error)
    records: dict[str, Any] = {}
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            if shared and id(record) in shared:
                records[name] = shared[id(record)]
            elif all(type(array.data) is bytes for array in record.values()):
                records[name] = pack_record(record)
            else:
                records[name] = record  # of a client that changed one: the strategy refuses it
        else:
            records[name] = record
    return Envelope(message.metadata, records, None)


def unpack(envelope: Envelope, shared: Mapping[int, ArrayRecord] | None = None) -> Message:
    """Put a message together again."""
    if envelope.records is None:
        assert envelope.error is not None
        return with_metadata(envelope.error, envelope.metadata)
    content = RecordDict()
    for name, record in envelope.records.items():
        if isinstance(record, SharedRecord):
            assert shared is not None
            content[name] = shared[record.key]
        else:
            content[name] = unpack_record(record) if isinstance(record, PackedRecord) else record
    return with_metadata(content, envelope.metadata)
