"""How a Message moves between processes on Ray: large arrays out of band, shared ones once a round and worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, Metadata, RecordDict

from fedlora.flower import with_metadata

PackedRecord = dict[str, tuple[str, tuple[int, ...], str, np.ndarray]]

LARGE = 2**16
"""Bytes of a record from which its arrays travel out of band; below, a copy costs less than the bookkeeping."""


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


def pack_record(record: ArrayRecord) -> PackedRecord:
    """View a record's bytes as numpy arrays, which Ray moves through shared memory in one copy."""
    return {name: (a.dtype, a.shape, a.stype, np.frombuffer(a.data, np.uint8)) for name, a in record.items()}


def unpack_record(packed: PackedRecord) -> ArrayRecord:
    """Undo :func:`pack_record`."""
    return ArrayRecord({name: Array(d, shape, s, view.tobytes()) for name, (d, shape, s, view) in packed.items()})


def pack(message: Message, shared: Mapping[int, SharedRecord] | None = None) -> Envelope:
    """Take a message apart; array records whose ``id`` is in ``shared`` are replaced."""
    if not message.has_content():
        return Envelope(message.metadata, None, message.error)
    records: dict[str, Any] = {}
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            if shared and id(record) in shared:
                records[name] = shared[id(record)]
            else:
                large = sum(len(array.data) for array in record.values()) >= LARGE
                records[name] = pack_record(record) if large else record
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
            content[name] = unpack_record(record) if isinstance(record, dict) else record
    return with_metadata(content, envelope.metadata)
