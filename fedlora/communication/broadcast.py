"""Adds to every training message what its client lacks of the parts that clients keep."""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.communication.decorator import GridDecorator
from fedlora.communication.parts import INITIAL, Parts, Piece
from fedlora.communication.wire import encode
from fedlora.errors import ClientErrorCode

HELD = "held"
"""Key of the record that names the version of every part that a round needs, and what increments are added to."""

AFTER, KEY = "after/", "key/"
"""Before a chain's name in that record: the version that increments are added to, and the chain's key."""


def record_key(part: str, made: int) -> str:
    """Return the key of a part's arrays in a message; it tells whether they were made before the first round."""
    if part == INITIAL:
        return INITIAL
    return f"{INITIAL if made == 0 else 'changed'}/{part}"


def is_initial(key: str) -> bool:
    """Whether a record holds arrays that were made before the first round."""
    return key.partition("/")[0] == INITIAL


def group_of(server_round: int, exchange: int = 1, attempt: int = 0) -> str:
    """Return the group of the messages of an exchange.

    It is the round; after it, where the round has several exchanges or is repeated, which of them it is; and after that
    how often it was repeated.
    """
    if attempt:
        return f"{server_round}/{exchange}/{attempt}"
    return str(server_round) if exchange == 1 else f"{server_round}/{exchange}"


def round_of(message: Message) -> int:
    """Return the round of a message."""
    return int(message.metadata.group_id.partition("/")[0] or 0)


class Broadcast(GridDecorator):
    """Completes messages, whatever the strategy that made them.

    A client that answers that it does not hold a part (its node lost its cache) gets its message again, with all of it.

    Parameters
    ----------
    grid : Grid
    parts : Parts
    clients : mapping of int to int
        Node id to client number.
    dtype : torch.dtype
        Of the wire.

    Attributes
    ----------
    wanted : collection of str
        Parts that the round needs.
    """

    def __init__(self, grid: Grid, parts: Parts, clients: Mapping[int, int], dtype: torch.dtype) -> None:
        super().__init__(grid)
        self.parts, self.clients, self.dtype = parts, clients, dtype
        self.wanted: Collection[str] = (INITIAL,)
        self._encoded: dict[tuple[str, str, str], ArrayRecord] = {}
        self._current: dict[Hashable, tuple[dict[str, str], ConfigRecord]] = {}
        self._completed: dict[int, tuple[RecordDict, RecordDict]] = {}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send with what is missing, and pass the replies on as they come."""
        self._current, self._completed = {}, {}
        outgoing = [self._complete(message) for message in messages]
        live = {pair for current, _ in self._current.values() for pair in current.items()}
        self._encoded = {key: record for key, record in self._encoded.items() if key[:2] in live}
        by_node = {message.metadata.dst_node_id: message for message in outgoing}
        forgotten = []
        began = time.monotonic()
        for reply in self.grid.send_and_receive(outgoing, timeout=timeout):
            node = reply.metadata.src_node_id
            lacks = reply.has_error() and reply.error.code == ClientErrorCode.NEEDS_INITIAL
            if lacks and node in by_node and node not in forgotten:
                forgotten.append(node)
            else:
                yield reply
        if forgotten:
            for node in forgotten:
                self.parts.forget(self._client(node))
            again = [_copy(self._complete(by_node[node])) for node in forgotten]
            left = None if timeout is None else max(0.0, began + timeout - time.monotonic())
            yield from self.grid.send_and_receive(again, timeout=left)

    def _client(self, node: int) -> int:
        return self.clients.get(node, -1 - node)  # one that nobody knows is itself alone

    def _versions(self, client: int) -> tuple[dict[str, str], ConfigRecord]:
        """Return what a client has to hold in this round, and the record that says so; most clients share both."""
        own = self.parts.blocks(client)
        key = None if own is None else own[0]
        if key not in self._current:
            versions = self.parts.versions(self.wanted, client)
            self._current[key] = versions, ConfigRecord(self._about(versions))
        return self._current[key]

    def _complete(self, message: Message) -> Message:
        client, server_round = self._client(message.metadata.dst_node_id), round_of(message)
        # An evaluation is of what the round made, which training messages hold from the next round on.
        server_round += message.metadata.message_type == MessageType.EVALUATE
        current, held = self._versions(client)
        if not current:
            self.parts.sent(client, self.wanted, server_round)
            return message
        records: dict[str, ArrayRecord] = {}
        missing = self.parts.missing(client, self.wanted)
        if after := {AFTER + part: piece.after for part, piece in missing.items() if piece.after}:
            held = ConfigRecord(self._about(current) | after)
        for part, piece in missing.items():
            records[record_key(part, piece.made)] = self._record(part, current[part], piece)
        self.parts.sent(client, self.wanted, server_round)
        # The content may be one object shared by all of a round's messages, so it is not changed in place.
        before = message.content
        if missing:
            message.content = RecordDict({**before, HELD: held, **records})
        else:
            if id(before) not in self._completed:
                self._completed[id(before)] = before, RecordDict({**before, HELD: held})
            message.content = self._completed[id(before)][1]
        return message

    def _about(self, current: Mapping[str, str]) -> dict[str, Any]:
        """Return the versions of parts, with the keys of chains; most clients of a round need know no more."""
        return {**current, **{KEY + part: c.key for part, c in self.parts.chains.items() if part in current}}

    def _record(self, part: str, version: str, piece: Piece) -> ArrayRecord:
        """Encode a piece once, however many clients lack it."""
        key = (part, version, piece.after)
        if key not in self._encoded:
            self._encoded[key] = encode(piece.arrays, self.dtype)
        return self._encoded[key]


def _copy(message: Message) -> Message:
    meta = message.metadata
    return Message(message.content, meta.dst_node_id, meta.message_type, ttl=meta.ttl, group_id=meta.group_id)
