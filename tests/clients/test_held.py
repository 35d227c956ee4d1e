"""The parts that a host keeps for its clients: they reach the model, survive restarts, and are asked for when lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedlora.adapters import AdaptedModel
from fedlora.adapters.model import linear_shape
from fedlora.arrays import Arrays
from fedlora.clients import held
from fedlora.clients.held import part_arrays, part_path, receive
from fedlora.communication import Broadcast, digest, encode
from fedlora.communication.broadcast import HELD, record_key
from fedlora.communication.parts import INITIAL, Parts
from fedlora.errors import ClientErrorCode, NeedsInitialError
from fedlora.roles import FROZEN, INCREMENT, Role, Roles
from tests import tiny
from tests.messages import FIRST_NODE, FakeGrid, error_reply, train_message

ROLES: Roles = {"lora_A": Role(trained=True, down="stale", up="value"), "lora_B": FROZEN, "residual": INCREMENT}
RESIDUAL = "residual"
HOSTS = 2


class Rooms:
    """All that is asked of a participant: room in the cache. It keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[Path, ...]]] = []

    def make_room(self, needed: int, *used: Path) -> None:
        self.asked.append((needed, used))


class World:
    """A server with parts, and hosts that each have a cache, a model and a memory of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, models: list[AdaptedModel]) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.server, *self.models = models
        self.memory: list[dict[str, Any]] = [{} for _ in range(HOSTS)]
        self.rooms = [Rooms() for _ in range(HOSTS)]
        self.received: list[Arrays] = [{} for _ in range(HOSTS)]
        self.grid = FakeGrid(self.answer, HOSTS)
        self.wire = Broadcast(self.grid, Parts("run"), {FIRST_NODE + i: i for i in range(HOSTS)}, torch.float32)
        self.wire.wanted = (INITIAL, "lora_A", RESIDUAL)
        self.round = 0
        self.set_part(INITIAL, ["lora_B"], 0)
        self.set_part("lora_A", ["lora_A"], 0)

    @property
    def parts(self) -> Parts:
        return self.wire.parts

    def set_part(self, part: str, kinds: list[str], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = self.server.arrays(self.server.names(kinds))
        self.parts.set(part, {n: torch.randn(a.shape, generator=generator) for n, a in drawn.items()}, self.round)

    def add(self, seed: int, rank: int = 1) -> None:
        """Add an increment to every layer's residual, as the server does after a round."""
        generator = torch.Generator().manual_seed(seed)
        made: Arrays = {}
        for path, adapter in self.server.adapters.items():
            m, n = linear_shape(adapter.base)
            made[f"{path}.residual_A"] = torch.randn(rank, n, generator=generator)
            made[f"{path}.residual_B"] = torch.randn(m, rank, generator=generator)
        self.parts.add(RESIDUAL, made, self.round)

    @contextmanager
    def on(self, host: int) -> Iterator[None]:
        """Be on a host: its disk, and what its process has in memory."""
        self.monkeypatch.setenv("FEDLORA_CACHE", str(self.folder / str(host)))
        held._chains.clear()
        held._chains.update(self.memory[host])
        part_arrays.cache_clear()
        yield
        self.memory[host] = dict(held._chains)

    def answer(self, message: Message) -> Message:
        host = message.metadata.dst_node_id - FIRST_NODE
        client: Any = self.rooms[host]
        with self.on(host):
            try:
                self.received[host] = receive(client, message, ROLES, self.models[host])
            except NeedsInitialError:
                return error_reply(message, ClientErrorCode.NEEDS_INITIAL, "")
            return Message(RecordDict(), reply_to=message)

    def exchange(self, *hosts: int) -> int:
        """Send the next round's messages; return how many were sent again."""
        self.round += 1
        before = len(self.grid.sent)
        messages = [train_message(FIRST_NODE + host, RecordDict(), self.round) for host in hosts]
        replies = list(self.wire.send_and_receive(messages))
        assert len(replies) == len(hosts)
        assert not any(reply.has_error() for reply in replies)
        return sum(map(len, self.grid.sent[before + 1 :]))

    def check(self, host: int) -> None:
        """The host's model holds the server's versions, to the bit."""
        model = self.models[host]
        for part in (INITIAL, "lora_A"):
            _, piece = self.parts.whole[part]
            kept = model.arrays(piece.arrays)
            assert all(torch.equal(kept[name], array) for name, array in piece.arrays.items())
            assert all(torch.equal(self.received[host][name], array) for name, array in piece.arrays.items())
        total = self.parts.chains[RESIDUAL].total if RESIDUAL in self.parts.chains else {}
        assert model.residual.keys() == total.keys()
        assert all(torch.equal(model.residual[path], value) for path, value in total.items())

    def restart(self, host: int) -> None:
        """Let the host's process end: the model is as it was loaded, and only the disk is left."""
        model = self.models[host]
        model.versions.clear()
        model.set_residual({})
        model.set_shared({name: torch.zeros_like(array) for name, array in model.arrays().items()})
        self.memory[host] = {}

    def files(self, host: int) -> list[Path]:
        return sorted((self.folder / str(host) / "initial").glob("*"))


@pytest.fixture(scope="module")
def models() -> list[AdaptedModel]:
    """The server's, and one a host."""
    config = tiny.settings("bert", method={"rank": 2})
    return [tiny.adapted_model("bert", config) for _ in range(1 + HOSTS)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: list[AdaptedModel]) -> Iterator[World]:
    made = World(tmp_path, monkeypatch, models)
    for host in range(HOSTS):
        made.restart(host)
    yield made
    held._chains.clear()
    part_arrays.cache_clear()


def test_a_host_that_misses_rounds_restarts_and_loses_its_cache_has_the_servers_arrays(world: World) -> None:
    draw = torch.Generator().manual_seed(1)

    def sometimes(share: float) -> bool:
        return float(torch.rand(1, generator=draw)) < share

    again = 0
    for number in range(24):
        if number:
            world.add(number, rank=1 + number % 2)
        if number % 4 == 3:
            world.set_part("lora_A", ["lora_A"], number)
        asked = [0, *([1] if sometimes(0.4) else [])]
        for host in asked:
            if sometimes(0.2):
                world.restart(host)
            if sometimes(0.2):
                for file in world.files(host):
                    file.unlink()
                world.restart(host)
        again += world.exchange(*asked)
        for host in asked:
            world.check(host)
    assert again > 2


def test_what_is_held_does_not_travel_again_over_restarts(world: World) -> None:
    world.add(1)
    world.exchange(0)
    world.restart(0)
    assert world.exchange(0) == 0
    assert set(world.grid.sent[-1][0].content) == {HELD}
    world.check(0)
    # The owner's cache keeps what is in use.
    used = {path for _, paths in world.rooms[0].asked[-3:] for path in paths}
    assert {path.name for path in used} == {path.name for path in world.files(0)}
    assert len(used) == 3


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes()[:200])])
@pytest.mark.parametrize("which", ["all", "whole", "chain"])
def test_a_file_that_was_cut_short_is_replaced(world: World, damage: Callable[[Path], object], which: str) -> None:
    world.add(1)
    world.exchange(0)
    world.restart(0)
    for path in world.files(0):
        if which == "all" or (".chain" in path.name) == (which == "chain"):
            damage(path)
    assert world.exchange(0) == 1
    world.check(0)
    world.restart(0)
    assert world.exchange(0) == 0  # it is whole again
    world.check(0)


def test_a_changed_number_on_the_disk_is_noticed(world: World) -> None:
    world.exchange(0)
    world.restart(0)
    path = next(path for path in world.files(0) if ".chain" not in path.name)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert world.exchange(0) == 1
    world.check(0)


def test_a_server_that_went_back_to_an_older_copy_of_its_run_finds_its_clients_again(world: World) -> None:
    world.add(1)
    world.exchange(0)
    chain = world.parts.chains[RESIDUAL]
    arrays, about = chain.to_arrays()
    before = (dict(world.parts.held[0]), type(chain).from_arrays(arrays, about))
    world.add(2)
    world.exchange(0)
    world.check(0)
    # The round is lost, and its noise is drawn anew.
    world.parts.held[0], world.parts.chains[RESIDUAL] = before
    world.add(3)
    assert world.exchange(0) == 1
    world.check(0)
    assert world.exchange(0) == 0


def test_all_increments_need_nothing_of_what_was_there(world: World) -> None:
    """A host that was sent a sum keeps no increments before it."""
    world.add(1, rank=20)  # more numbers than the sum
    world.exchange(0)
    key = world.parts.chains[RESIDUAL].key
    # Another server of the same run that has all increments, as a small first one lets it.
    world.parts.chains.clear()
    world.add(2)
    assert world.parts.chains[RESIDUAL].key == key
    world.parts.held[0].pop(RESIDUAL)
    assert world.exchange(0) == 0
    world.check(0)


def test_a_run_without_residuals_takes_the_last_runs_away(world: World) -> None:
    world.add(1)
    world.exchange(0)
    assert world.models[0].residual
    world.parts.chains.clear()
    world.exchange(0)
    assert not world.models[0].residual
    world.check(0)


def test_arrays_that_are_not_those_announced_are_refused_and_not_kept(world: World) -> None:
    with world.on(0):
        client: Any = world.rooms[0]
        junk = {"x": torch.ones(3)}
        part = {name: torch.ones_like(array) for name, array in world.parts.whole[INITIAL][1].arrays.items()}
        for arrays, version, error in ((part, "0" * 64, RuntimeError), (junk, digest(junk), KeyError)):
            message = message_of(INITIAL, arrays, version)
            with pytest.raises(error):
                receive(client, message, ROLES, world.models[0])
        assert world.files(0) == []


def message_of(part: str, arrays: Arrays, version: str) -> Message:
    content = RecordDict({record_key(part, 0): encode(arrays), HELD: ConfigRecord({part: version})})
    return train_message(FIRST_NODE, content)


@pytest.mark.parametrize("name", ["../../own", "/etc/passwd", "0" * 63, "", "A" * 64, "0" * 64 + "\n"])
def test_a_server_names_no_file(name: str) -> None:
    for sort in ("", "chain"):
        with pytest.raises(ValueError, match="no SHA-256"):
            part_path(name, sort)
