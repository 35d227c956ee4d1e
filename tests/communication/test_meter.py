"""The meter counts what is sent: every number is checked against Flower's own serialisation."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from flwr.serverapp import Grid
from hypothesis import given
from hypothesis import strategies as st

from fedlora.communication import MeteredGrid, meter
from fedlora.communication.meter import INITIAL, Row, message_size, row_dict
from fedlora.communication.wire import payload_bytes
from fedlora.results.folder import COMMUNICATION
from tests.messages import FIRST_NODE, FakeGrid, error_reply, random_record, train_message

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
dtypes = st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.uint8])


@st.composite
def array_records(draw: st.DrawFn) -> ArrayRecord:
    arrays = draw(st.dictionaries(names, st.tuples(shapes, dtypes), max_size=4))
    return ArrayRecord({name: Array(np.ones(shape, dtype)) for name, (shape, dtype) in arrays.items()})


numbers = st.integers(-(2**40), 2**40) | st.floats(allow_nan=False)
metric_records = st.dictionaries(names, numbers, max_size=4).map(MetricRecord)
config_records = st.dictionaries(names, numbers | names | st.binary(max_size=9) | st.booleans(), max_size=4).map(
    ConfigRecord
)
contents = st.dictionaries(names, array_records() | metric_records | config_records, max_size=4).map(RecordDict)
node_ids = st.integers(1, 2**63 - 1)


def serialised(message: Message) -> int:
    return len(message_to_proto(message).SerializeToString())


@given(contents, node_ids, st.integers(0, 10**6), st.floats(1, 1e6))
def test_the_size_is_that_of_the_serialised_message(content: RecordDict, node: int, group: int, ttl: float) -> None:
    message = Message(content, node, "train", ttl=ttl, group_id=str(group))
    assert message_size(message) == serialised(message)
    reply = Message(content, reply_to=message)
    reply.metadata.__dict__["_message_id"] = "f" * 64
    assert message_size(reply) == serialised(reply)


@pytest.mark.parametrize("elements", [0, 1, 30, 31, 32, 4000, 4064, 4065, 4096, 10**6])
def test_lengths_that_need_more_digits_are_counted(elements: int) -> None:
    # The length of every part is itself a number of one byte or more.
    message = train_message(3, RecordDict({"a": random_record({"x": (elements,)})}))
    assert message_size(message) == serialised(message)


@given(st.integers(0, 200), names, node_ids)
def test_the_size_of_an_error_is_that_of_the_serialised_message(code: int, reason: str, node: int) -> None:
    reply = error_reply(train_message(node), code, reason)
    assert message_size(reply) == serialised(reply)


def test_a_message_without_records_has_a_size() -> None:
    message = train_message(5)
    assert message_size(message) == serialised(message) > 0


@given(st.dictionaries(names, st.tuples(shapes, dtypes), max_size=5))
def test_the_payload_is_elements_times_their_size(arrays: dict[str, Any]) -> None:
    values = {name: np.ones(shape, dtype) for name, (shape, dtype) in arrays.items()}
    record = ArrayRecord({name: Array(value) for name, value in values.items()})
    assert payload_bytes(record) == sum(value.nbytes for value in values.values())


@given(st.lists(array_records(), min_size=1, max_size=3), st.lists(st.tuples(st.integers(0, 2), names), max_size=6))
def test_sizes_that_are_remembered_are_those_of_the_record_and_its_key(
    records: list[ArrayRecord], uses: list[tuple[int, str]]
) -> None:
    for index, key in uses:
        message = train_message(1, RecordDict({key: records[index % len(records)]}))
        assert message_size(message) == serialised(message)


def echo(message: Message) -> Message:
    return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)


def metered(answer: Any = echo, clients: int = 3, formula: Any = lambda r, c, way: 1) -> MeteredGrid:
    return MeteredGrid(FakeGrid(answer, clients), formula, {FIRST_NODE + i: i for i in range(clients)})


def test_rows_and_totals_are_those_of_the_messages() -> None:
    shared = random_record({"w": (4, 5)})
    content = RecordDict({"arrays": shared, "config": ConfigRecord({"server-round": 3})})
    calls: list[tuple[int, int, str]] = []

    def formula(server_round: int, client: int, direction: str) -> int:
        calls.append((server_round, client, direction))
        return {"down": 80, "up": 79}[direction]

    grid = metered(formula=formula)
    messages = [train_message(FIRST_NODE + i, content, server_round=3) for i in (2, 0)]
    sizes = {m.metadata.dst_node_id: serialised(m) for m in messages}
    replies = list(grid.send_and_receive(messages, timeout=9.0))
    assert grid.grid.timeouts == [9.0]
    up = {r.metadata.src_node_id: serialised(r) for r in replies}
    totals = {
        "initial_bytes": 0,
        "downlink_bytes": sum(sizes.values()),
        "uplink_bytes": sum(up.values()),
        "payload_bytes": 4 * 80,
        "formula_bytes": 2 * (80 + 79),
    }
    assert grid.totals == totals
    rows = grid.take_rows()
    assert rows == [
        Row(3, 0, "down", 80, sizes[FIRST_NODE], 80),
        Row(3, 0, "up", 80, up[FIRST_NODE], 79),
        Row(3, 2, "down", 80, sizes[FIRST_NODE + 2], 80),
        Row(3, 2, "up", 80, up[FIRST_NODE + 2], 79),
    ]
    assert sorted(calls) == sorted((row.round, row.client, row.direction) for row in rows)
    assert grid.take_rows() == []
    assert grid.totals == totals  # taking the rows takes nothing from the totals
    assert tuple(row_dict(rows[0])) == COMMUNICATION


def test_the_initial_arrays_are_a_row_of_their_own() -> None:
    start = random_record({"a": (3, 3)})
    with_start = RecordDict({"arrays": random_record({"w": (2,)}), INITIAL: start})
    without = RecordDict({"arrays": random_record({"w": (2,)})})
    grid = metered()
    first, second = train_message(FIRST_NODE, with_start), train_message(FIRST_NODE + 1, without)
    whole, bare = serialised(first), serialised(second)
    list(grid.send_and_receive([first, second]))
    initial, down, up, down_1, up_1 = grid.take_rows()
    assert (initial.direction, initial.payload_bytes) == (INITIAL, 36)
    assert (down.direction, down.payload_bytes, down_1.payload_bytes, up.payload_bytes) == ("down", 8, 8, 8)
    assert initial.message_bytes + down.message_bytes == whole
    assert initial.message_bytes > 36
    # The message's own length may need a byte more with the initial arrays in it than without.
    assert 0 <= down.message_bytes - bare <= 4
    assert down_1.message_bytes == bare
    assert grid.totals["initial_bytes"] == initial.message_bytes
    assert grid.totals["payload_bytes"] == 36 + 4 * 8
    assert up_1.client == 1


def test_messages_without_arrays_and_errors_have_no_payload_and_no_formula() -> None:
    grid = metered(lambda message: error_reply(message, 101, "no" * 50), formula=lambda r, c, way: 10**9)
    list(grid.send_and_receive([train_message(FIRST_NODE)]))
    down, up = grid.take_rows()
    assert (down.payload_bytes, down.formula_bytes, up.payload_bytes, up.formula_bytes) == (0, 0, 0, 0)
    assert up.message_bytes > 100  # the reason travels
    assert grid.totals["formula_bytes"] == 0


def test_all_array_records_of_a_reply_count() -> None:
    extra = RecordDict({"a": random_record({"x": (2,)}), "b": random_record({"y": (3,)}, np.float64)})
    grid = metered(lambda message: Message(extra, reply_to=message))
    list(grid.send_and_receive([train_message(FIRST_NODE)]))
    assert grid.take_rows()[1].payload_bytes == 8 + 24


def test_a_node_that_nobody_knows_is_counted_as_client_minus_one() -> None:
    grid = metered()
    content = RecordDict({"arrays": random_record({"w": (2,)})})
    list(grid.send_and_receive([train_message(5, content)]))
    assert {row.client for row in grid.take_rows()} == {-1}


def test_replies_are_passed_on_as_they_come() -> None:
    answered: list[int] = []

    def answer(message: Message) -> Message:
        answered.append(message.metadata.dst_node_id)
        return echo(message)

    grid = metered(answer)
    content = RecordDict({"arrays": random_record({"w": (2,)})})
    replies = grid.send_and_receive(train_message(FIRST_NODE + i, content) for i in range(3))
    next(iter(replies))
    assert answered == [FIRST_NODE]
    assert sum(row.direction == "up" for row in grid.rows) == 1


def test_a_lost_reply_is_not_counted() -> None:
    grid = metered(lambda message: None)
    list(grid.send_and_receive([train_message(FIRST_NODE)]))
    assert [row.direction for row in grid.take_rows()] == ["down"]


def test_arrays_of_one_layout_are_serialised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    original = meter.record_size

    def spy(key: str, record: ArrayRecord) -> int:
        measured.append(key)
        return original(key, record)

    monkeypatch.setattr(meter, "record_size", spy)
    meter._size_of_layout.cache_clear()
    grid = metered(echo, clients=20)
    contents = [RecordDict({"arrays": random_record({"w": (10,)})}) for _ in range(20)]
    list(grid.send_and_receive(train_message(FIRST_NODE + i, content) for i, content in enumerate(contents)))
    assert len(measured) == 1
    assert len({(row.direction, row.message_bytes) for row in grid.take_rows()}) == 2


def test_a_decorated_grid_is_the_grid_in_everything_else() -> None:
    inner = FakeGrid(echo, 4)
    grid = MeteredGrid(inner, lambda r, c, way: 0, {})
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == list(inner.get_node_ids())
    assert grid.run.run_id == 7
    message = grid.create_message(RecordDict(), "query", 100, "2", ttl=5.0)
    meta = message.metadata
    assert (meta.dst_node_id, meta.message_type, meta.group_id, meta.ttl) == (100, "query", "2", 5.0)
    assert list(grid.push_messages([message])) == ["id-100"]
    assert list(grid.pull_messages(["id-100"])) == []


def test_a_counted_reply_is_freed_when_it_is_dropped() -> None:
    freed: list[bool] = []

    class Content(RecordDict):
        def __del__(self) -> None:
            freed.append(True)

    def answer(message: Message) -> Message:
        return Message(Content({"arrays": random_record({"w": (2,)})}), reply_to=message)

    grid = metered(answer)
    gc.disable()
    try:
        for _ in grid.send_and_receive([train_message(FIRST_NODE + i) for i in range(3)]):
            pass
        del _
        assert len(freed) == 3
    finally:
        gc.enable()
