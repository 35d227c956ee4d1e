"""What happens to an update between a client and the mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.chain import ChainLink, ClipUpdate, EqualWeights, ServerNoise, Update, UpdateChain, flat
from fedlora.communication.codecs import get_codec
from fedlora.privacy.mechanisms import get_mechanism
from fedlora.registry import CODECS
from fedlora.strategies.aggregation import WeightedMean
from fedlora.strategies.chain import updates
from tests.messages import FIRST_NODE, train_message

SHAPES = {"layer.lora_A": (2, 5), "layer.lora_B": (3, 2), "head.bias": (4,)}
START = {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def drawn(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def replies(records: Sequence[ArrayRecord], **metrics: Any) -> list[tuple[int, Message]]:
    found = []
    for client, record in enumerate(records):
        said = MetricRecord({"num-examples": 10 * (client + 1), "loss": 0.5, **metrics})
        content = RecordDict({"arrays": record, "metrics": said})
        found.append((client, Message(content, reply_to=train_message(FIRST_NODE + client))))
    return found


def received(
    chain: UpdateChain, messages: list[tuple[int, Message]], start: dict[str, torch.Tensor] = START, mode: str = "none"
) -> tuple[list[Update], list[tuple[int, str]]]:
    refused: list[tuple[int, str]] = []
    origin = flat(start, SHAPES)
    stream = updates(
        messages,
        chain,
        mechanism=get_mechanism(mode),
        shapes=lambda client: SHAPES,
        start=lambda client: origin,
        weight=lambda client, examples: float(examples),
        refuse=lambda client, text: refused.append((client, text)),
    )
    return list(stream), refused


def mean_of(found: list[Update]) -> torch.Tensor:
    mean = WeightedMean()
    for update in found:
        mean.add({"all": update.vector}, update.weight)
    result = mean.result()
    assert result is not None
    return result["all"]


@pytest.mark.parametrize("name", CODECS.names())
def test_without_links_an_update_is_what_was_sent(name: str) -> None:
    chain = UpdateChain(get_codec(name))
    sent = [drawn(seed) for seed in (1, 2, 3)]
    found, refused = received(chain, replies([chain.send(arrays, START) for arrays in sent]))
    assert not refused
    assert [(update.client, update.weight) for update in found] == [(0, 10.0), (1, 20.0), (2, 30.0)]
    for update, arrays in zip(found, sent, strict=True):
        kept = get_codec(name).decode(get_codec(name).encode(arrays))
        assert {n: a.tolist() for n, a in update.arrays.items()} == {n: a.tolist() for n, a in kept.items()}
        assert update.metrics["loss"] == 0.5


@settings(max_examples=40)
@given(st.integers(0, 99), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_a_clipped_move_is_no_longer_than_its_bound_and_points_the_same_way(
    seed: int, scale: float, bound: float
) -> None:
    start, vector = flat(drawn(100), SHAPES), flat(drawn(seed, scale), SHAPES)
    link = ClipUpdate(bound)
    clipped = link.client(vector, start)
    move, kept = vector.double() - start.double(), clipped.double() - start.double()
    slack = 1e-6 * (1 + float(start.norm()) + float(vector.norm()))  # of float32
    assert float(kept.norm()) <= bound + slack
    assert torch.allclose(kept, move * min(1.0, bound / float(move.norm())), atol=slack)
    if float(move.norm()) <= bound:
        assert torch.equal(clipped, vector)


def test_a_server_clips_what_a_client_did_not() -> None:
    chain = UpdateChain(get_codec("float32"), [ClipUpdate(0.5), EqualWeights()])
    honest, other = chain.send(drawn(1), START), get_codec("float32").encode(drawn(2, 100.0))
    found, refused = received(chain, replies([honest, other]))
    assert not refused
    assert [update.weight for update in found] == [1.0, 1.0]
    for update in found:
        assert float(update.vector.norm()) == pytest.approx(0.5, rel=1e-5)


def test_links_come_in_order_on_both_halves_and_around_the_codec() -> None:
    seen: list[str] = []

    class Noted(ChainLink):
        def __init__(self, name: str) -> None:
            self.name = name

        def client(self, vector: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            seen.append(f"{self.name} client")
            return vector + 1

        def server(self, update: Update, start: torch.Tensor) -> Update:
            seen.append(f"{self.name} server")
            return Update(update.client, update.weight, update.vector - 1, update.shapes, update.metrics)

        def mean(self, vector: torch.Tensor, weights: Sequence[float], start: torch.Tensor) -> torch.Tensor:
            seen.append(f"{self.name} mean")
            return vector

    chain = UpdateChain(get_codec("int8"), [Noted("a"), Noted("b")])
    found, _ = received(chain, replies([chain.send(drawn(1), START)]))
    chain.finish(mean_of(found), [1.0], flat(START, SHAPES))
    assert seen == ["a client", "b client", "a server", "b server", "a mean", "b mean"]
    assert torch.allclose(found[0].vector, flat(drawn(1), SHAPES), atol=0.05)


def test_a_bad_reply_costs_its_client_alone() -> None:
    class Fussy(ChainLink):
        def server(self, update: Update, start: torch.Tensor) -> Update:
            if update.client == 3:
                raise RuntimeError("not this one\nnever")
            return update

    codec = get_codec("float32")
    infinite = drawn(1)
    infinite["layer.lora_B"][0, 0] = math.inf
    records = [codec.encode(infinite), get_codec("int8").encode(drawn(1)), codec.encode({"x": torch.ones(1)})]
    found, refused = received(UpdateChain(codec, [Fussy()]), replies([*records, *2 * [codec.encode(drawn(1))]]))
    assert [update.client for update in found] == [4]
    assert [client for client, _ in refused] == [0, 1, 2, 3]
    texts = [text for _, text in refused]
    assert all(text.startswith("the reply is refused: ") and "\n" not in text for text in texts)
    assert "layer.lora_B is not finite" in texts[0]
    assert "not this one" in texts[3]


def test_a_private_reply_says_what_was_spent() -> None:
    chain = UpdateChain(get_codec("float32"))
    spent = {"steps": 2, "noise-multiplier": 1.0, "sample-rate": 0.5, "epsilon": 1.0, "delta": 1e-5}
    record = chain.send(drawn(1), START)
    assert not received(chain, replies([record], **spent), mode="example")[1]
    assert received(chain, replies([record]), mode="example")[1]


def test_updates_are_read_as_the_replies_come() -> None:
    chain, asked = UpdateChain(get_codec("float32")), []

    def coming() -> Any:
        for client, message in replies([chain.send(drawn(i), START) for i in range(3)]):
            asked.append(client)
            yield client, message

    stream = updates(
        coming(),
        chain,
        mechanism=get_mechanism("none"),
        shapes=lambda client: SHAPES,
        start=lambda client: flat(START, SHAPES),
        weight=lambda client, examples: 1.0,
        refuse=lambda client, text: pytest.fail(text),
    )
    for client in range(3):
        assert next(stream).client == client
        assert asked == list(range(client + 1))


def test_noise_at_the_server_is_as_wide_as_asked_for() -> None:
    """Its deviation is that of the sum over the number of clients, or over the expected number."""
    start, mean = torch.ones(20_000), torch.full((20_000,), 3.0)
    for expected, count in ((None, 4), (8.0, 4)):
        noisy = ServerNoise(6.0, torch.Generator().manual_seed(0), expected).mean(mean, [1.0] * count, start)
        divisor = expected or count
        assert float(noisy.std()) == pytest.approx(6.0 / divisor, rel=0.05)
        assert float(noisy.mean()) == pytest.approx(1 + 2 * count / divisor, abs=0.05)
    assert torch.allclose(ServerNoise(0.0, torch.Generator()).mean(mean, [1.0] * 3, start), mean)


def test_noise_at_the_server_needs_equal_weights() -> None:
    with pytest.raises(ValueError, match="weigh 1 each"):
        ServerNoise(1.0, torch.Generator()).mean(torch.ones(3), [1.0, 2.0], torch.zeros(3))
