"""A client that missed rounds reaches the server's version to the bit; the smaller of increments and sum travels."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedlora.arrays import Arrays
from fedlora.communication.parts import INITIAL, Chain, Parts, Piece, residual_sum
from fedlora.communication.wire import decode, digest, encode

M, N = 15, 10
PATHS = ("layer.0", "layer.1")


def increment(rank: int, seed: int, paths: tuple[str, ...] = PATHS) -> Arrays:
    """Draw one round's residuals, dense (rank 0) or as factors; as they arrive from the wire."""
    generator = torch.Generator().manual_seed(seed)
    made: Arrays = {}
    for path in paths:
        if rank:
            made[f"{path}.residual_B"] = torch.randn(M, rank, generator=generator)
            made[f"{path}.residual_A"] = torch.randn(rank, N, generator=generator)
        else:
            made[f"{path}.residual"] = torch.randn(M, N, generator=generator)
    return decode(encode(made))


def numbers(arrays: Arrays) -> int:
    return sum(array.numel() for array in arrays.values())


def same(first: Arrays, second: Arrays) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stored(chain: Chain) -> Chain:
    """Write a chain and read it again, as checkpoints and nodes do."""
    arrays, about = chain.to_arrays()
    return Chain.from_arrays(load(save(arrays)), about)


ranks = st.lists(st.integers(0, 4), min_size=1, max_size=8)
"""Of each round's increment. A sum has 300 numbers, a factored increment 50 a rank, a dense one 300."""


class Client:
    """The client's half of a chain: what it holds, by what it was sent."""

    def __init__(self, key: str) -> None:
        self.chain = Chain(key)

    def take(self, piece: Piece, version: str) -> None:
        assert not piece.after or self.chain.knows(piece.after)
        self.chain.follow(decode(encode(piece.arrays)), piece.after, version)


@given(ranks, st.data())
def test_whoever_missed_rounds_reaches_the_servers_sum_to_the_bit(drawn: list[int], data: st.DataObject) -> None:
    parts = Parts("run")
    clients: dict[int, Client] = {}
    everything: list[Arrays] = []
    for server_round, rank in enumerate(drawn, 1):
        everything.append(increment(rank, server_round))
        parts.add("residual", everything[-1], server_round)
        chain = parts.chains["residual"]
        exact: Arrays = {}
        for one in everything:
            exact = residual_sum(exact, one)
        assert same(chain.total, exact)
        if data.draw(st.booleans(), "the server is resumed"):
            parts.chains["residual"] = chain = stored(chain)
        asked = data.draw(st.sets(st.integers(0, 3)), "asked")
        for client in asked:
            half = clients.setdefault(client, Client(chain.key))
            for piece in parts.missing(client, ["residual"]).values():
                assert piece.made == server_round
                half.take(piece, chain.version)
            parts.sent(client, ["residual"], server_round)
            assert half.chain.version == chain.version
            assert same(half.chain.total, exact)
            assert parts.missing(client, ["residual"]) == {}
            kept = stored(half.chain)  # what cannot be stored is of no use
            if data.draw(st.booleans(), "the client restarts"):
                half.chain = kept


@given(ranks)
def test_the_smaller_of_increments_and_sum_travels(drawn: list[int]) -> None:
    chain, everything, versions = Chain("key"), [], [""]
    for server_round, rank in enumerate(drawn, 1):
        everything.append(increment(rank, server_round))
        chain.add(server_round, everything[-1])
        versions.append(chain.version)
        whole = numbers(chain.total)
        assert whole == len(PATHS) * M * N
        for place, version in enumerate(versions[:-1]):
            lacking = sum(map(numbers, everything[place:]))
            piece = chain.since(version)
            assert piece.numbers == min(lacking, whole)
            assert bool(piece.after) == (lacking <= whole)
        assert chain.since("a version that nobody has").numbers == whole
        # No more is kept than somebody would be sent.
        assert len(chain.increments) == 1 or sum(numbers(arrays) for _, arrays in chain.increments) <= whole
    assert len(set(versions)) == len(versions)


@given(ranks, st.data())
def test_increments_of_other_layers_lead_there_too(drawn: list[int], data: st.DataObject) -> None:
    """The sum grows with the layers that are in it, so that what is smaller changes."""
    parts, half = Parts("run"), None
    for server_round, rank in enumerate(drawn, 1):
        paths = tuple(data.draw(st.sets(st.sampled_from(PATHS), min_size=1)))
        parts.add("residual", increment(rank, server_round, paths), server_round)
        chain = parts.chains["residual"]
        half = half or Client(chain.key)
        if data.draw(st.booleans()):
            (piece,) = parts.missing(0, ["residual"]).values()
            assert piece.numbers <= max(numbers(chain.total), numbers(chain.increments[-1][1]))
            half.take(piece, chain.version)
            parts.sent(0, ["residual"], server_round)
            assert same(half.chain.total, chain.total)
            assert same(stored(half.chain).total, chain.total)
            assert same(stored(half.chain).base, half.chain.base)


@given(st.lists(st.integers(1, 2), min_size=2, max_size=3))
def test_a_chain_that_went_ahead_takes_the_same_increments_once(drawn: list[int]) -> None:
    """A client whose reply was lost has what its server sends it again."""
    server, half = Chain("key"), Client("key")
    for server_round, rank in enumerate(drawn, 1):
        server.add(server_round, increment(rank, server_round))
    piece = server.since("")
    assert piece.after == "key"
    for _ in range(2):
        half.take(piece, server.version)
        assert same(half.chain.total, server.total)
        assert half.chain.version == server.version


def test_a_client_that_was_sent_the_sum_has_no_start_to_add_increments_to() -> None:
    server, half = Chain("key"), Client("key")
    assert half.chain.knows("key")
    for server_round in (1, 2):
        server.add(server_round, increment(0, server_round))
    piece = server.since("")
    assert piece.after == ""
    half.take(piece, server.version)
    assert half.chain.knows(server.version)
    assert not half.chain.knows("key")


def test_increments_that_were_changed_on_the_way_are_noticed() -> None:
    server, half = Chain("key"), Client("key")
    server.add(1, increment(1, 1))
    piece = server.since("")
    arrays = {name: array + 1e-6 for name, array in piece.arrays.items()}
    with pytest.raises(ValueError, match="do not lead to the version"):
        half.chain.follow(arrays, piece.after, server.version)


def test_a_chains_versions_depend_on_its_key_its_rounds_and_its_numbers() -> None:
    found = set()
    for key, made, seed in (("a", 1, 1), ("b", 1, 1), ("a", 2, 1), ("a", 1, 2)):
        chain = Chain(key)
        chain.add(made, increment(1, seed))
        found.add(chain.version)
    assert len(found) == 4
    first, second = Parts("run"), Parts("another run")
    for parts in (first, second):
        parts.add("residual", increment(1, 1), 1)
    first.add("other", increment(1, 1), 1)
    keys = [first.chains["residual"].key, first.chains["other"].key, second.chains["residual"].key]
    assert len(set(keys)) == 3
    assert "run" not in keys[0]


def test_a_round_adds_one_increment_at_most() -> None:
    chain = Chain("key")
    chain.add(1, increment(1, 1))
    with pytest.raises(ValueError, match="round 1 made an increment already"):
        chain.add(1, increment(1, 2))
    assert same(chain.total, residual_sum({}, increment(1, 1)))


# Parts that are replaced.


wholes = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(wholes, st.data())
def test_a_part_that_is_replaced_travels_when_a_client_lacks_its_version(drawn: list[int], data: st.DataObject) -> None:
    parts = Parts("run")
    holds: dict[int, Arrays] = {}
    for server_round, value in enumerate(drawn, 1):
        current = {"x.lora_A": torch.full((2, 3), float(value))}
        parts.set("lora_A", current, server_round - 1)
        for client in data.draw(st.sets(st.integers(0, 3))):
            found = parts.missing(client, ["lora_A"])
            assert set(found) == (set() if same(holds.get(client, {}), current) else {"lora_A"})
            for piece in found.values():
                assert (piece.after, piece.numbers) == ("", 6)
                holds[client] = piece.arrays
            parts.sent(client, ["lora_A"], server_round)
            assert same(holds[client], current)
            assert parts.versions(["lora_A"]) == {"lora_A": digest(current)}


def test_a_part_remembers_the_round_that_made_it() -> None:
    parts = Parts("run")
    parts.set("lora_A", {"x": torch.ones(2)}, 0)
    parts.set("lora_A", {"x": torch.ones(2)}, 3)  # a round that changed nothing
    assert parts.missing(0, ["lora_A"])["lora_A"].made == 0
    parts.set("lora_A", {"x": torch.zeros(2)}, 4)
    assert parts.missing(0, ["lora_A"])["lora_A"].made == 4


def test_parts_without_arrays_and_unknown_parts_are_nobodys_lack() -> None:
    parts = Parts("run")
    parts.set(INITIAL, {}, 0)
    assert parts.versions([INITIAL, "residual"]) == {}
    assert parts.missing(0, [INITIAL, "residual"]) == {}


def test_a_client_gets_the_parts_of_the_round_and_no_other() -> None:
    parts = Parts("run")
    for part in (INITIAL, "lora_A", "lora_B"):
        parts.set(part, {part: torch.ones(2)}, 0)
    assert set(parts.missing(0, [INITIAL, "lora_A"])) == {INITIAL, "lora_A"}
    parts.sent(0, [INITIAL, "lora_A"], 1)
    assert set(parts.missing(0, [INITIAL, "lora_B"])) == {"lora_B"}
    assert set(parts.missing(1, [INITIAL, "lora_B"])) == {INITIAL, "lora_B"}


def test_the_round_of_the_last_contact_is_known() -> None:
    parts = Parts("run")
    parts.set(INITIAL, {"x": torch.ones(2)}, 0)
    found = []
    for server_round in (1, 4, 5):
        parts.sent(7, [INITIAL], server_round)
        found.append(parts.since[7])
    assert found == [None, 1, 4]
    parts.forget(7)
    parts.sent(7, [INITIAL], 6)
    assert parts.since[7] is None


@given(st.dictionaries(st.integers(0, 9), st.sets(st.sampled_from([INITIAL, "lora_A", "residual"])), max_size=8))
def test_what_clients_hold_survives_in_a_checkpoint(holding: dict[int, set[str]]) -> None:
    def fill(parts: Parts) -> None:
        parts.set(INITIAL, {"x": torch.ones(2)}, 0)
        parts.set("lora_A", {"y": torch.ones(3)}, 2)

    parts = Parts("run")
    fill(parts)
    parts.add("residual", increment(1, 1), 1)
    for client, wanted in holding.items():
        parts.sent(client, sorted(wanted), 2 + client)
    state: Any = json.loads(json.dumps(parts.state_dict()))
    resumed = Parts("run")
    resumed.load_state_dict(state)
    fill(resumed)
    resumed.chains["residual"] = stored(parts.chains["residual"])
    assert resumed.last == parts.last
    for client in range(10):
        lacks, before = (p.missing(client, [INITIAL, "lora_A", "residual"]) for p in (resumed, parts))
        assert set(lacks) == set(before)
        for part, piece in lacks.items():
            assert (piece.after, piece.made) == (before[part].after, before[part].made)
            assert same(piece.arrays, before[part].arrays)
    assert state["made"] == {INITIAL: 0, "lora_A": 2}


def test_many_clients_make_a_small_state() -> None:
    parts = Parts("run")
    for part in (INITIAL, "lora_A"):
        parts.set(part, {part: torch.ones(2)}, 0)
    for client in range(1000):
        parts.sent(client, [INITIAL, "lora_A"], 1)
    parts.sent(500, [INITIAL], 2)
    state = parts.state_dict()
    assert len(json.dumps(state)) < 1000 * 12  # a version alone has 64 letters
    assert [len(group["clients"]) for group in state["holders"]] == [1000]


def test_clients_that_hold_the_same_share_one_dict() -> None:
    parts = Parts("k")
    parts.set(INITIAL, {"a": torch.zeros(2)}, 0)
    parts.set("lora_A", {"b": torch.zeros(2)}, 0)
    for client in range(3):
        parts.sent(client, (INITIAL,), 1)
    assert parts.held[0] is parts.held[1] is parts.held[2]
    before = dict(parts.held[0])
    parts.sent(1, ("lora_A",), 2)
    assert parts.held[0] == parts.held[2] == before
    assert parts.held[1].keys() == {INITIAL, "lora_A"}
