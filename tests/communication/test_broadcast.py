"""Frozen arrays travel once a client, and again to one that lost them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedlora.communication import InitialBroadcast, MeteredGrid, encode
from fedlora.communication.meter import INITIAL
from fedlora.errors import ClientErrorCode
from tests.messages import FIRST_NODE, FakeGrid, error_reply, train_message

START = encode({"A": torch.arange(6.0)})


def ok(message: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def broadcast(answer: Callable[[Message], Message | None] = ok) -> tuple[InitialBroadcast, FakeGrid]:
    grid = FakeGrid(answer)
    return InitialBroadcast(grid, START), grid


def exchange(wire: InitialBroadcast, clients: tuple[int, ...], server_round: int, content: RecordDict) -> list[Message]:
    messages = [train_message(FIRST_NODE + i, content, server_round) for i in clients]
    return list(wire.send_and_receive(messages, timeout=5.0))


def test_every_node_gets_the_arrays_once() -> None:
    wire, grid = broadcast()
    got: Counter[int] = Counter()
    for server_round, clients in enumerate([(0, 1), (1, 2), (0, 1, 2)], 1):
        exchange(wire, clients, server_round, RecordDict({"arrays": encode({"w": torch.ones(2)})}))
        for message in grid.sent[-1]:
            got[message.metadata.dst_node_id] += INITIAL in message.content
            assert "arrays" in message.content
    assert got == {FIRST_NODE: 1, FIRST_NODE + 1: 1, FIRST_NODE + 2: 1}
    assert wire.contacted == set(got)
    assert grid.timeouts == [5.0] * 3


def test_the_shared_content_is_left_alone() -> None:
    wire, grid = broadcast()
    wire.contacted = {FIRST_NODE}
    content = RecordDict({"arrays": encode({"w": torch.ones(2)}), "config": ConfigRecord({"x": 1})})
    exchange(wire, (0, 1), 1, content)
    assert set(content) == {"arrays", "config"}
    known, fresh = grid.sent[0]
    assert known.content is content
    assert fresh.content["arrays"] is content["arrays"]  # not copied: the meter and the grid share it
    assert fresh.content[INITIAL] is START


def test_without_frozen_arrays_nothing_is_added() -> None:
    grid = FakeGrid(ok)
    wire = InitialBroadcast(grid, encode({}))
    exchange(wire, (0, 1), 1, RecordDict())
    assert all(INITIAL not in message.content for message in grid.sent[0])


def test_a_node_that_lost_the_arrays_gets_its_message_again_with_them() -> None:
    lost = {FIRST_NODE + 1}

    def answer(message: Message) -> Message:
        if message.metadata.dst_node_id in lost and INITIAL not in message.content:
            return error_reply(message, ClientErrorCode.NEEDS_INITIAL, "")
        return ok(message)

    wire, grid = broadcast(answer)
    wire.contacted = {FIRST_NODE, FIRST_NODE + 1, FIRST_NODE + 2}
    content = RecordDict({"config": ConfigRecord({"server-round": 4})})
    replies = exchange(wire, (0, 1, 2), 4, content)
    assert sorted(r.metadata.src_node_id - FIRST_NODE for r in replies) == [0, 1, 2]
    assert not any(reply.has_error() for reply in replies)
    ((again,),) = grid.sent[1:]
    assert again.metadata.dst_node_id == FIRST_NODE + 1
    assert (again.metadata.group_id, again.metadata.message_type) == ("4", "train")
    assert set(again.content) == {"config", INITIAL}
    assert set(content) == {"config"}
    assert grid.timeouts == [5.0, 5.0]
    assert wire.contacted == {FIRST_NODE, FIRST_NODE + 1, FIRST_NODE + 2}


def test_a_node_that_never_holds_them_is_answered_by_its_error_and_asked_once_more_only() -> None:
    wire, grid = broadcast(lambda message: error_reply(message, ClientErrorCode.NEEDS_INITIAL, "disk full"))
    (reply,) = exchange(wire, (0,), 1, RecordDict())
    assert reply.error.code == ClientErrorCode.NEEDS_INITIAL
    assert len(grid.sent) == 2


def test_other_errors_pass() -> None:
    wire, grid = broadcast(lambda message: error_reply(message, ClientErrorCode.FAILED, "why"))
    (reply,) = exchange(wire, (0,), 1, RecordDict())
    assert reply.error.reason == "why"
    assert len(grid.sent) == 1


def test_the_resent_arrays_are_metered_too() -> None:
    def answer(message: Message) -> Message:
        return ok(message) if INITIAL in message.content else error_reply(message, ClientErrorCode.NEEDS_INITIAL, "")

    meter = MeteredGrid(FakeGrid(answer), lambda r, c, way: 24, {FIRST_NODE: 0})
    wire = InitialBroadcast(meter, START)
    wire.contacted = {FIRST_NODE}
    exchange(wire, (0,), 2, RecordDict())
    rows = meter.take_rows()
    assert [row.direction for row in rows] == ["initial", "down", "down", "up", "up"]
    assert rows[0].payload_bytes == rows[0].formula_bytes == 24
    assert {row.round for row in rows} == {2}
