"""What clients keep travels once a version and client, and again to one that lost it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedlora.arrays import Arrays
from fedlora.communication import Broadcast, MeteredGrid, decode, digest, encode
from fedlora.communication.broadcast import AFTER, HELD, KEY, is_initial, record_key
from fedlora.communication.parts import INITIAL, Chain, Parts
from fedlora.errors import ClientErrorCode
from tests.messages import FIRST_NODE, FakeGrid, error_reply, train_message

START = {"A": torch.arange(6.0)}
CLIENTS = {FIRST_NODE + client: client for client in range(3)}
RESIDUAL = "residual"


def ok(message: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def broadcast(answer: Callable[[Message], Message | None] = ok, start: Arrays = START) -> tuple[Broadcast, FakeGrid]:
    grid = FakeGrid(answer)
    parts = Parts("run")
    parts.set(INITIAL, start, 0)
    return Broadcast(grid, parts, CLIENTS, torch.float32), grid


def exchange(wire: Broadcast, clients: tuple[int, ...], server_round: int, content: RecordDict) -> list[Message]:
    messages = [train_message(FIRST_NODE + i, content, server_round) for i in clients]
    return list(wire.send_and_receive(messages, timeout=5.0))


def know(wire: Broadcast, *clients: int) -> None:
    """Let the server have sent its parts to clients, in round 1."""
    for client in clients:
        wire.parts.sent(client, wire.wanted, 1)


def increment(seed: int, rank: int = 1) -> Arrays:
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(5, rank, generator=generator), torch.randn(rank, 4, generator=generator)
    return {"layer.residual_B": b, "layer.residual_A": a}


def test_every_node_gets_the_arrays_once() -> None:
    wire, grid = broadcast()
    got: Counter[int] = Counter()
    for server_round, clients in enumerate([(0, 1), (1, 2), (0, 1, 2)], 1):
        exchange(wire, clients, server_round, RecordDict({"arrays": encode({"w": torch.ones(2)})}))
        for message in grid.sent[-1]:
            got[message.metadata.dst_node_id] += INITIAL in message.content
            assert "arrays" in message.content
            # Whether they come or not, their version is announced.
            assert message.content[HELD] == ConfigRecord({INITIAL: digest(START)})
    assert got == {FIRST_NODE: 1, FIRST_NODE + 1: 1, FIRST_NODE + 2: 1}
    assert set(wire.parts.held) == {CLIENTS[node] for node in got}
    assert grid.timeouts == [5.0] * 3


def test_the_shared_content_is_left_alone() -> None:
    wire, grid = broadcast()
    know(wire, 0)
    content = RecordDict({"arrays": encode({"w": torch.ones(2)}), "config": ConfigRecord({"x": 1})})
    exchange(wire, (0, 1, 2), 2, content)
    assert set(content) == {"arrays", "config"}
    known, fresh, other = grid.sent[0]
    assert set(known.content) == {"arrays", "config", HELD}
    assert known.content["arrays"] is content["arrays"]
    assert fresh.content["arrays"] is content["arrays"]  # not copied: the meter and the grid share it
    assert fresh.content[INITIAL] is other.content[INITIAL]
    assert torch.equal(decode(fresh.content[INITIAL])["A"], START["A"])  # type: ignore[arg-type]


def test_without_parts_nothing_is_added() -> None:
    wire, grid = broadcast(start={})
    content = RecordDict({"config": ConfigRecord({"x": 1})})
    exchange(wire, (0, 1), 1, content)
    assert all(message.content is content for message in grid.sent[0])
    assert set(content) == {"config"}
    assert wire.parts.last == {0: 1, 1: 1}  # which a payload formula may ask for


def test_a_node_that_lost_the_arrays_gets_its_message_again_with_them() -> None:
    lost = {FIRST_NODE + 1}

    def answer(message: Message) -> Message:
        if message.metadata.dst_node_id in lost and INITIAL not in message.content:
            return error_reply(message, ClientErrorCode.NEEDS_INITIAL, "")
        return ok(message)

    wire, grid = broadcast(answer)
    know(wire, 0, 1, 2)
    content = RecordDict({"config": ConfigRecord({"server-round": 4})})
    replies = exchange(wire, (0, 1, 2), 4, content)
    assert sorted(r.metadata.src_node_id - FIRST_NODE for r in replies) == [0, 1, 2]
    assert not any(reply.has_error() for reply in replies)
    ((again,),) = grid.sent[1:]
    assert again.metadata.dst_node_id == FIRST_NODE + 1
    assert (again.metadata.group_id, again.metadata.message_type) == ("4", "train")
    assert again.metadata.ttl == grid.sent[0][1].metadata.ttl
    assert set(again.content) == {"config", HELD, INITIAL}
    assert set(content) == {"config"}
    first, left = grid.timeouts  # both together are not above the round's
    assert (first, left) == (5.0, pytest.approx(5.0, abs=1.0))
    assert left < first
    assert set(wire.parts.held) == {0, 1, 2}
    assert wire.parts.missing(1, wire.wanted) == {}


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
    parts = Parts("run")
    parts.set(INITIAL, START, 0)
    wire = Broadcast(meter, parts, CLIENTS, torch.float32)
    know(wire, 0)
    exchange(wire, (0,), 2, RecordDict())
    rows = meter.take_rows()
    assert [row.direction for row in rows] == ["initial", "down", "down", "up", "up"]
    assert rows[0].payload_bytes == rows[0].formula_bytes == 24
    assert {row.round for row in rows} == {2}


# Parts that rounds change.


class Host:
    """A client's half of the parts, without a model."""

    def __init__(self) -> None:
        self.whole: dict[str, Arrays] = {}
        self.chain: Chain | None = None
        self.lost = False

    def answer(self, message: Message) -> Message:
        about: Any = message.content[HELD]
        if self.lost:
            self.whole, self.chain, self.lost = {}, None, False
        for part, version in about.items():
            if "/" in part:
                continue
            keys = {record_key(part, 0), record_key(part, 1)} & set(message.content)
            came: list[Any] = [message.content[key] for key in keys]
            assert len(came) <= 1
            if part == RESIDUAL:
                chain, after = self.chain or Chain(str(about[KEY + part])), str(about.get(AFTER + part, ""))
                if chain.version != version:
                    if not came or (after and not chain.knows(after)):
                        return error_reply(message, ClientErrorCode.NEEDS_INITIAL, "")
                    chain.follow(decode(came[0]), after, version)
                self.chain = chain
            elif came:
                self.whole[part] = decode(came[0])
                assert digest(self.whole[part]) == version
            elif part not in self.whole or digest(self.whole[part]) != version:
                return error_reply(message, ClientErrorCode.NEEDS_INITIAL, "")
        return ok(message)


def test_clients_that_miss_rounds_and_lose_their_cache_hold_what_the_server_holds() -> None:
    hosts = {node: Host() for node in CLIENTS}
    wire, grid = broadcast(lambda message: hosts[message.metadata.dst_node_id].answer(message))
    wire.wanted = (INITIAL, "lora_A", RESIDUAL)
    draw = torch.Generator().manual_seed(3)
    resent = 0
    for server_round in range(1, 30):
        stale = {"layer.lora_A": torch.full((2, 2), float(server_round // 3))}
        wire.parts.set("lora_A", stale, server_round - 1)
        if server_round > 1:
            wire.parts.add(RESIDUAL, increment(server_round), server_round - 1)
        asked = tuple(c for c in range(3) if float(torch.rand(1, generator=draw)) < (0.9, 0.5, 0.2)[c])
        for client in asked:
            hosts[FIRST_NODE + client].lost = float(torch.rand(1, generator=draw)) < 0.2
        sent = len(grid.sent)
        replies = exchange(wire, asked, server_round, RecordDict())
        assert not any(reply.has_error() for reply in replies)
        assert sorted(CLIENTS[reply.metadata.src_node_id] for reply in replies) == list(asked)
        resent += len(grid.sent) - sent - 1
        for client in asked:
            host = hosts[FIRST_NODE + client]
            assert torch.equal(host.whole[INITIAL]["A"], START["A"])
            assert torch.equal(host.whole["lora_A"]["layer.lora_A"], stale["layer.lora_A"])
            if server_round > 1:
                assert host.chain is not None
                chain = wire.parts.chains[RESIDUAL]
                assert host.chain.version == chain.version
                assert torch.equal(host.chain.total["layer"], chain.total["layer"])
    assert resent > 3


def test_increments_go_to_those_that_lack_them_and_the_sum_to_the_others() -> None:
    wire, grid = broadcast()
    wire.wanted = (RESIDUAL,)
    for made in range(1, 4):
        wire.parts.add(RESIDUAL, increment(made), made)
        if made == 2:
            know(wire, 1)
    know(wire, 0)
    chain = wire.parts.chains[RESIDUAL]
    exchange(wire, (0, 1, 2), 4, RecordDict())
    current, behind, new = (message.content for message in grid.sent[0])
    key = record_key(RESIDUAL, 3)
    assert not is_initial(key)
    assert key not in current
    assert {HELD} == set(current)
    assert set(behind[key]) == {"layer.residual_B@3", "layer.residual_A@3"}  # 9 numbers instead of 20
    assert behind[HELD][AFTER + RESIDUAL] == chain.versions[-2]  # type: ignore[index,call-overload]
    assert set(new[key]) == {"layer.residual"}  # three rounds have 27 numbers, the sum 20
    assert AFTER + RESIDUAL not in new[HELD]  # type: ignore[operator]
    for content in (current, behind, new):
        assert content[HELD][KEY + RESIDUAL] == chain.key  # type: ignore[index,call-overload]
        assert content[HELD][RESIDUAL] == chain.version  # type: ignore[index,call-overload]


def test_a_piece_is_encoded_once_however_many_lack_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wire, grid = broadcast()
    wire.wanted = (INITIAL, RESIDUAL)
    wire.parts.add(RESIDUAL, increment(1), 1)
    calls: list[Arrays] = []
    monkeypatch.setattr("fedlora.communication.broadcast.encode", lambda a, d: calls.append(a) or encode(a, d))
    exchange(wire, (0, 1, 2), 2, RecordDict())
    assert len(calls) == 2
    # And is forgotten with its version.
    wire.parts.add(RESIDUAL, increment(2), 2)
    exchange(wire, (0, 1, 2), 3, RecordDict())
    assert len(calls) == 3
    assert len({id(message.content[record_key(RESIDUAL, 2)]) for message in grid.sent[1]}) == 1
    assert {part for part, _, _ in wire._encoded} == {INITIAL, RESIDUAL}
    assert len(wire._encoded) == 2


def test_what_was_made_before_the_first_round_is_initial_and_later_versions_go_down() -> None:
    meter = MeteredGrid(FakeGrid(ok), lambda r, c, way: 1, CLIENTS)
    wire = Broadcast(meter, Parts("run"), CLIENTS, torch.float32)
    wire.wanted = ("lora_A",)
    wire.parts.set("lora_A", {"x.lora_A": torch.zeros(3)}, 0)
    exchange(wire, (0,), 1, RecordDict())
    wire.parts.set("lora_A", {"x.lora_A": torch.ones(3)}, 1)
    exchange(wire, (0, 1), 2, RecordDict())
    found = [(row.round, row.client, row.direction, row.payload_bytes) for row in meter.take_rows()]
    assert [row for row in found if row[3]] == [(1, 0, "initial", 12), (2, 0, "down", 12), (2, 1, "down", 12)]


def test_nodes_that_nobody_knows_are_themselves_alone() -> None:
    wire, grid = broadcast()
    wire.clients = {}
    exchange(wire, (0, 1), 1, RecordDict())
    exchange(wire, (0, 1), 2, RecordDict())
    assert [[INITIAL in message.content for message in sent] for sent in grid.sent] == [[True, True], [False, False]]
    assert set(wire.parts.held) == {-1 - FIRST_NODE, -2 - FIRST_NODE}
