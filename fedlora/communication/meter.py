"""MeteredGrid counts the bytes of every message, both ways, around whatever Grid there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.communication.broadcast import is_initial, round_of
from fedlora.communication.decorator import GridDecorator
from fedlora.communication.parts import INITIAL
from fedlora.communication.wire import payload_bytes
from fedlora.flower import message_sizes, metadata_values, record_size, with_metadata

_EVALUATE = "evaluate_"
DIRECTIONS = (INITIAL, "down", "up", f"{_EVALUATE}down", f"{_EVALUATE}up")


@dataclass(frozen=True)
class Row:
    """One line of communication.csv.

    Attributes
    ----------
    round, client : int
    direction : str
        initial (made before the first round; once a client), down or up; evaluate_down or evaluate_up of messages with
        which clients evaluate, for which no method has a formula.
    payload_bytes : int
        Elements times dtype size of all arrays.
    message_bytes : int
        The message in Flower's protobuf form: payload, array headers, names, metrics, config and metadata.
    formula_bytes : int
        What the method's formula says the payload is.
    """

    round: int
    client: int
    direction: str
    payload_bytes: int
    message_bytes: int
    formula_bytes: int


class MeteredGrid(GridDecorator):
    """Counts messages on their way through another Grid.

    Parameters
    ----------
    grid : Grid
    formula : callable (round, client, direction) -> int
        The method's payload in bytes.
    clients : mapping of int to int
        Node id to client (partition) number.

    Attributes
    ----------
    rows : list of Row
        What was counted since they were last taken.
    totals : dict of str to int
        initial_bytes, downlink_bytes and uplink_bytes (of messages), payload_bytes and formula_bytes (all directions);
        evaluation_bytes of messages with which clients evaluate, where there are any: these are in no other total.
    """

    def __init__(self, grid: Grid, formula: Callable[[int, int, str], int], clients: Mapping[int, int]) -> None:
        super().__init__(grid)
        self.formula, self.clients = formula, clients
        self.rows: list[Row] = []
        names = ("initial_bytes", "downlink_bytes", "uplink_bytes", "payload_bytes", "formula_bytes")
        self.totals = dict.fromkeys(names, 0)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send, receive and count; replies are passed on as they come."""
        outgoing = list(messages)
        seen: dict[int, tuple[_Content, int, int]] = {}  # by id: messages of a round share their contents
        for message in outgoing:
            key = id(message.content)
            if key not in seen:
                seen[key] = _measure(message.content), _payload(message, False), _payload(message, True)
            self._count_down(message, *seen[key])
        # The round is that of the messages, whatever a reply says.
        server_round = round_of(outgoing[0]) if outgoing else 0
        up = _evaluation(outgoing[0]) + "up" if outgoing else "up"
        for reply in self.grid.send_and_receive(outgoing, timeout=timeout):
            try:
                size = message_size(reply)
            except Exception:  # a simulated client can answer with what no message holds; the strategy refuses it
                size = 0
            self._add(server_round, reply.metadata.src_node_id, up, _payload(reply, False), size)
            yield reply

    def take_rows(self) -> list[Row]:
        """Return the rows counted since the last call, in order of client and direction."""
        rows = sorted(self.rows, key=lambda r: (r.round, r.client, DIRECTIONS.index(r.direction)))
        self.rows = []
        return rows

    def _count_down(self, message: Message, content: _Content, payload: int, initial: int) -> None:
        node, server_round, evaluation = message.metadata.dst_node_id, round_of(message), _evaluation(message)
        if content.initial:
            # An evaluation sends what the next round would start from.
            of_round = server_round + bool(evaluation)
            self._add(server_round, node, INITIAL, initial, content.initial, of_round)
        size = _whole_size(message, content) - content.initial
        self._add(server_round, node, evaluation + "down", payload, size)

    def _add(
        self, server_round: int, node: int, direction: str, payload: int, size: int, of_round: int | None = None
    ) -> None:
        client = self.clients.get(node, -1)
        evaluates, formula = direction.startswith(_EVALUATE), 0
        if payload and client >= 0 and not evaluates:
            formula = self.formula(server_round if of_round is None else of_round, client, direction)
        row = Row(server_round, client, direction, payload, size, formula)
        self.rows.append(row)
        if evaluates:
            self.totals["evaluation_bytes"] = self.totals.get("evaluation_bytes", 0) + size
            return
        self.totals[{"down": "downlink_bytes", "up": "uplink_bytes", INITIAL: "initial_bytes"}[direction]] += size
        self.totals["payload_bytes"] += payload
        self.totals["formula_bytes"] += formula


def _array_records(message: Message) -> Iterator[tuple[str, ArrayRecord]]:
    # Not content.array_records: its reference cycle keeps the arrays until the next garbage collection.
    for key, record in message.content.items() if message.has_content() else ():
        if isinstance(record, ArrayRecord):
            yield key, record


def _evaluation(message: Message) -> str:
    """Return what the directions of a message and its reply begin with."""
    return _EVALUATE if message.metadata.message_type == MessageType.EVALUATE else ""


def row_dict(row: Row) -> dict[str, int | str]:
    """Return a row as a dict in the order of communication.csv's columns."""
    return dict(vars(row))


class _Content(NamedTuple):
    """What a message's size depends on, of its content.

    Attributes
    ----------
    arrays, initial : int
        Bytes of all records of arrays, and of those made before the first round.
    layout : tuple
        Of the other records.
    """

    arrays: int
    initial: int
    layout: tuple[Any, ...]


def _measure(content: RecordDict) -> _Content:
    arrays = initial = 0
    small: list[Any] = []
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            size = _record_size(key, record)
            arrays += size
            initial += size if is_initial(key) else 0
        else:
            small.append((key, type(record), tuple((name, *_varying(value)) for name, value in record.items())))
    return _Content(arrays, initial, tuple(small))


def _payload(message: Message, initial: bool) -> int:
    """Return the bytes of the numbers alone, of the arrays made before the first round or of the others."""
    return sum(payload_bytes(record) for key, record in _array_records(message) if is_initial(key) == initial)


def message_size(message: Message) -> int:
    """Exact size in bytes of a message in Flower's protobuf form, without serialising like messages again."""
    if not message.has_content():
        return message_sizes(message)[0]
    return _whole_size(message, _measure(message.content))


def _whole_size(message: Message, measured: _Content) -> int:
    metadata = tuple((name, *_varying(value)) for name, value in metadata_values(message).items())
    layout = metadata, measured.layout
    sizes = _SIZES.get(layout)
    if sizes is None:
        rest = RecordDict({k: v for k, v in message.content.items() if not isinstance(v, ArrayRecord)})
        if len(_SIZES) >= _MOST_SIZES:
            _SIZES.clear()
        sizes = _SIZES[layout] = message_sizes(with_metadata(rest, message.metadata))
    whole, content = sizes
    return whole - _varint(content) + measured.arrays + _varint(content + measured.arrays)


_SIZES: dict[tuple[Any, ...], tuple[int, int]] = {}
"""Of a message without its arrays, and of its content, by what they depend on."""

_MOST_SIZES = 2**12


def _varying(value: Any) -> tuple[Any, ...]:
    """Return what a value's size depends on, which is less than the value."""
    if isinstance(value, list):
        return (list, *(_varying(item) for item in value))
    if isinstance(value, float):
        return float, value == 0
    if isinstance(value, int) and value >= 0:
        return type(value), value.bit_length()
    if isinstance(value, str):
        value = value.encode()
    return type(value), len(value) if isinstance(value, bytes) else value


def _record_size(key: str, record: ArrayRecord) -> int:
    layout = tuple((name, array.dtype, array.shape, array.stype, len(array.data)) for name, array in record.items())
    return _size_of_layout(key, layout)


@lru_cache(maxsize=256)
def _size_of_layout(key: str, layout: tuple[tuple[str, str, tuple[int, ...], str, int], ...]) -> int:
    """Size of a record, which depends on its arrays' names, types and lengths and not on their numbers."""
    arrays = {name: Array(dtype, shape, stype, bytes(length)) for name, dtype, shape, stype, length in layout}
    return record_size(key, ArrayRecord(arrays))


def _varint(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))
