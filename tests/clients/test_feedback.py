"""Error feedback: nothing of an update is lost, whatever becomes of rounds, and it converges where a codec does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.arrays import Arrays
from fedlora.clients.client_app import app, forget_data
from fedlora.clients.feedback import ERRORS, ErrorMemory, encode_with_errors
from fedlora.clients.participant import participant
from fedlora.communication.codecs import Codec, get_codec, run_codecs
from fedlora.communication.wire import COUNTED, payload_bytes
from fedlora.config import WireSection, load_config, unused_keys
from fedlora.errors import InputError
from fedlora.methods import get_method
from fedlora.strategies.summary import memory_notes
from fedlora.transport import Coordinates
from tests.configs import override
from tests.owner import Server, write_node

SHAPES = {"lora_B": (5, 3), "head": (4,)}


class Keeper:
    """A client that keeps its arrays in memory."""

    def __init__(self) -> None:
        self.number, self.kept = 1, {}

    def own(self, sort: str) -> Arrays:
        return dict(self.kept.get(sort, {}))

    def keep(self, arrays: Arrays, sort: str) -> None:
        self.kept[sort] = arrays

    def send(
        self,
        updates: Arrays,
        codec: Codec,
        server_round: int,
        counted: int | None,
        exchange: int = 1,
        method: str = "ffa-lora",
        there: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> Arrays:
        """Return what the server decodes."""
        self.number = exchange
        said = {"server-round": server_round} | ({} if counted is None else {COUNTED: counted})
        client: Any = self
        coordinates = Coordinates(get_method(method), there, ["head"])
        return codec.decode(encode_with_errors(client, updates, codec, said, coordinates))

    @property
    def errors(self) -> Arrays:
        return ErrorMemory.of(self.own(ERRORS)).errors


def coarse(name: str, share: float = 0.2) -> Codec:
    return get_codec(name, WireSection(topk_fraction=share))


@pytest.mark.parametrize("name", ["onebit", "topk", "int8"])
def test_what_was_sent_and_what_is_left_are_all_updates_of_the_rounds_that_counted(name: str) -> None:
    """Rounds may pass without the client, not count, lack a reply, or be done again after a stop."""
    codec = coarse(name)
    fates = st.sampled_from(["counts", "is lost", "is repeated", "is without it", "loses its second exchange"])

    @given(st.lists(fates, min_size=1, max_size=8), st.integers(0, 99))
    @settings(max_examples=40, deadline=None)
    def check(rounds: list[str], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def update() -> Arrays:
            return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}

        client, counted = Keeper(), 0
        due = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
        for server_round, fate in enumerate(rounds, 1):
            if fate == "is without it":
                continue
            if fate == "is repeated":
                client.send(update(), codec, server_round, counted)
                client.send({"head": update()["head"]}, codec, server_round, counted, exchange=2)
            pairs = []
            for exchange in (1, 2):
                # The second exchange sends some arrays alone.
                own = {n: a for n, a in update().items() if exchange == 1 or n == "head"}
                pairs.append((own, client.send(own, codec, server_round, counted, exchange)))
            if fate in ("is lost", "loses its second exchange"):
                continue
            counted = server_round
            for own, sent in pairs:
                for n, array in own.items():
                    due[n] += array - sent[n]
        # The last round's fate is told with the next message.
        client.send({n: torch.zeros_like(a) for n, a in due.items()}, codec, len(rounds) + 1, counted)
        before = ErrorMemory.of(client.own(ERRORS)).states.get(0, {})
        for n, array in due.items():
            torch.testing.assert_close(before.get(n, torch.zeros_like(array)), array, rtol=0, atol=1e-12)

    check()


def test_what_is_left_turns_with_the_coordinates() -> None:
    """FedSVD's A turns in its row space: in dW = B A nothing of an update is lost."""
    codec, client, generator = coarse("onebit"), Keeper(), torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, due = torch.linalg.qr(draw(7, 3))[0].T, torch.zeros(5, 7, dtype=torch.float64)
    for server_round in (1, 2, 4):
        update = {"x.lora_B": draw(5, 3), "head": draw(4)}
        sent = client.send(
            update, codec, server_round, server_round // 2, method="fedsvd", there={"x.lora_A": a} | update
        )
        due += (update["x.lora_B"] - sent["x.lora_B"]) @ a
        torch.testing.assert_close(client.errors["x.lora_B"] @ a, due, rtol=0, atol=1e-12)
        a = torch.linalg.qr(draw(3, 3))[0] @ a
    assert due.norm() > 0.1


def test_a_client_of_a_smaller_rank_keeps_of_it_what_its_next_rows_can_express() -> None:
    """The first rows of a turned A span another space than before: what lies outside of it is dropped, nothing else."""
    codec, client, generator = coarse("onebit"), Keeper(), torch.Generator().manual_seed(0)
    a, turn = (torch.linalg.qr(torch.randn(7, 3, generator=generator, dtype=torch.float64))[0].T for _ in range(2))
    turned = torch.linalg.qr(turn[:, :3])[0] @ a
    update = {"x.lora_B": torch.randn(5, 2, generator=generator, dtype=torch.float64)}
    client.send(update, codec, 1, 0, method="fedsvd", there={"x.lora_A": a[:2]} | update)
    before = client.errors["x.lora_B"] @ a[:2]
    nothing = {"x.lora_B": torch.zeros(5, 2, dtype=torch.float64)}
    client.send(nothing, codec, 2, 1, method="fedsvd", there={"x.lora_A": turned[:2]} | nothing)
    found = ErrorMemory.of(client.own(ERRORS)).states[0]["x.lora_B"] @ turned[:2]
    torch.testing.assert_close(found, before @ turned[:2].T @ turned[:2], rtol=0, atol=1e-12)
    assert 0.01 < (found - before).norm() < before.norm()


def test_an_exchange_that_is_done_again_goes_on_from_the_one_before() -> None:
    codec, client = coarse("onebit"), Keeper()
    first, second = ({n: torch.randn(s, dtype=torch.float64) for n, s in SHAPES.items()} for _ in range(2))
    client.send(first, codec, 1, 0)
    once = client.send(second, codec, 1, 0, exchange=2)
    again = client.send(second, codec, 1, 0, exchange=2)
    assert all(torch.equal(once[n], again[n]) for n in SHAPES)


def quadratic(codec: Codec, feedback: bool, steps: int = 400) -> float:
    """Return how far from the optimum, relative to the start, four clients with unlike optima end.

    Client i has f_i(x) = |x - c_i|^2 / 2, so that the optimum of the mean is the mean of the c_i, at which no client's
    own gradient is 0. A client's update is a step along it, and steps shrink.
    """
    centres = torch.randn(4, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * torch.logspace(
        0, 1, 20, dtype=torch.float64
    )
    x, clients = torch.zeros(20, dtype=torch.float64), [Keeper() for _ in centres]
    for step in range(1, steps + 1):
        rate = 1 / (10 + step)
        sent = []
        for client, centre in zip(clients, centres, strict=True):
            update = {"x": rate * (centre - x)}
            found = client.send(update, codec, step, step - 1) if feedback else codec.decode(codec.encode(update))
            sent.append(found["x"].double())
        x = x + torch.stack(sent).mean(0)
    mean = centres.mean(0)
    return float((x - mean).norm() / mean.norm())


@pytest.mark.parametrize("name", ["onebit", "topk"])
def test_it_converges_on_a_quadratic_where_the_codec_alone_does_not(name: str) -> None:
    codec = coarse(name, 0.05)
    assert quadratic(codec, feedback=True) < 0.05
    assert quadratic(codec, feedback=False) > 0.2


# What a config says.


@pytest.mark.parametrize(
    ("name", "said", "updates", "feedback"),
    [
        ("float32", True, False, False),
        ("int8", None, False, False),
        ("int8", True, True, True),
        ("onebit", None, True, True),
        ("topk", None, True, True),
        ("onebit", False, True, False),
    ],
)
def test_it_is_on_where_the_codec_needs_it(name: str, said: bool | None, updates: bool, feedback: bool) -> None:
    content = override("wire.uplink_codec", name)
    if said is not None:
        content["wire"]["error_feedback"] = said
    config = load_config(content)
    assert (config.wire.sends_updates, config.wire.keeps_errors) == (updates, feedback)
    unused = [note for note in unused_keys(config) if note.startswith("wire.")]
    assert bool(unused) == (name == "float32")
    assert bool(run_codecs(config).notes) == (updates and not feedback)


def test_a_key_of_another_codec_has_no_use() -> None:
    for name, notes in (("topk", 0), ("onebit", 1)):
        content = override("wire.uplink_codec", name)
        content["wire"]["topk_fraction"] = 0.1
        assert sum(note.startswith("wire.topk_fraction ") for note in unused_keys(load_config(content))) == notes


def test_a_codec_that_no_direction_has_is_noted_with_its_keys() -> None:
    content = override("wire", {"codec": "topk", "downlink_codec": "int8", "uplink_codec": "onebit"})
    content["wire"]["topk_fraction"] = 0.1
    notes = [note.split()[0] for note in unused_keys(load_config(content))]
    assert [key for key in notes if key.startswith("wire.")] == ["wire.codec", "wire.topk_fraction"]


def test_a_run_says_what_its_clients_keep() -> None:
    for name, notes in (("onebit", ["each client keeps up to 828 bytes between rounds: what "]), ("int8", [])):
        found = memory_notes(load_config(override("wire.uplink_codec", name)), 100, 7, 4)
        assert [note[: len(start)] for note, start in zip(found, notes, strict=True)] == notes


def test_a_memory_in_coordinates_that_change_is_refused() -> None:
    content = override("wire.uplink_codec", "onebit")
    content["method"]["name"] = "flora"
    with pytest.raises(InputError, match=r"wire\.error_feedback = True: looks back .* flora .*; set it to false"):
        load_config(content)
    content["wire"]["error_feedback"] = False
    assert load_config(content).wire.sends_updates


# Real nodes.


def test_a_node_keeps_it_in_its_directory(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what stays at home; and it is the node's own that is added, since Flower's state ends with a restart."""
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    server = Server(tmp_path / "server", "ffa-lora", wire__uplink_codec="onebit")
    node_file = write_node(tmp_path / "clinic", cache)
    app(server.describe(), server.context(node_file))
    client = participant(server.train(1), server.context(node_file))
    client.keep({"kept": torch.ones(2)})
    sizes = []
    for server_round in (1, 2):
        message = server.train(server_round)
        message.content["config"] = ConfigRecord({**message.content["config"], COUNTED: server_round - 1})
        reply = app(message, server.context(node_file))
        assert not reply.has_error(), reply.error
        codec = get_codec("onebit")
        record = reply.content["arrays"]
        sizes.append(payload_bytes(record))
        assert sizes[-1] == sum(codec.payload_bytes(tuple(a.shape)) for a in codec.decode(record).values())
        memory = ErrorMemory.of(client.own(ERRORS))
        assert (memory.server_round, set(memory.states)) == (server_round, {0, 1} if server_round > 1 else {1})
        assert any(array.abs().max() > 0 for array in memory.errors.values())
    assert torch.equal(client.own()["kept"], torch.ones(2))
    files = list((tmp_path / "clinic").rglob("own/*.safetensors"))
    assert len(files) == 2
    for path in files:  # a node may lose its power while it writes
        path.write_bytes(path.read_bytes()[:50])
    assert client.own() == client.own(ERRORS) == {}
    forget_data()
