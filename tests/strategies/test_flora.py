"""FLoRA: its stack is the mean of the updates, reaches every client, and leaves a fresh start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedlora.adapters.model import linear_shape
from fedlora.arrays import Arrays
from fedlora.communication.parts import Chain, residual_sum
from fedlora.config import load_config
from fedlora.errors import InputError
from fedlora.roles import kind_of
from fedlora.strategies.base import Contact
from tests.small_runs import WEIGHTS, DrawnRounds, World, world

ANSWERING = [(0, 1, 2), (0, 2), (1,), (0, 1, 2), (1, 2)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("flora")) as made:
        yield made


def increment(result: Arrays) -> Arrays:
    return {name: array for name, array in result.items() if kind_of(name, ()).startswith("residual")}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("rank", [2, 12])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_every_round_adds_the_mean_of_its_own_updates(kind: str, rank: int, dtype: str, tolerance: float) -> None:
    rounds = DrawnRounds("flora", kind, dtype, rank=rank)
    for server_round, answering in enumerate(ANSWERING[:3], 1):
        before = dict(rounds.arrays)
        sent, result = rounds.round(server_round, answering)
        weights = [WEIGHTS[client] for client in answering]
        shares = [weight / sum(weights) for weight in weights]
        added = increment(result)
        here = residual_sum({}, added)
        for path, adapter in rounds.adapted.adapters.items():
            m, n = linear_shape(adapter.base)
            products = [adapter.scaling * a[f"{path}.lora_B"] @ a[f"{path}.lora_A"] for a in sent]
            ideal = sum(p * each for p, each in zip(shares, products, strict=True))
            assert isinstance(ideal, torch.Tensor)
            limit = tolerance * max(1.0, float(ideal.abs().max()))
            # Of m x n: a transpose would not even fit, as most layers are not square.
            torch.testing.assert_close(here[path], ideal, rtol=0, atol=limit)
            if len(answering) > 1:  # weights on both factors, and one client's update for the mean
                assert all((product - ideal).abs().max() > 100 * limit for product in products)
                twice = sum(p * p * each for p, each in zip(shares, products, strict=True))
                assert (twice - ideal).abs().max() > 100 * limit
            # Stacked where that is smaller.
            stacked = len(answering) * rank
            found = {n.rpartition(".")[2]: tuple(a.shape) for n, a in added.items() if n.startswith(f"{path}.")}
            factors = {"residual_B": (m, stacked), "residual_A": (stacked, n)}
            assert found == (factors if stacked * (m + n) <= m * n else {"residual": (m, n)})
            # Drawn anew, for every layer.
            assert not result[f"{path}.lora_B"].any()
            assert not torch.equal(result[f"{path}.lora_A"], before[f"{path}.lora_A"])
        for name in rounds.adapted.head_names:
            mean = sum(p * a[name] for p, a in zip(shares, sent, strict=True))
            torch.testing.assert_close(result[name], mean, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("rank", [1, 2, 4, 12])
def test_who_missed_rounds_gets_what_it_lacks(rank: int) -> None:
    """Stacks since a client's version, or their sum where that is smaller: the formula, and the server's sum."""
    rounds = DrawnRounds("flora", rank=rank)
    sizes = rounds.strategy.sizes(rounds.adapted)
    shapes = [linear_shape(adapter.base) for adapter in rounds.adapted.adapters.values()]
    both, head = sum(rank * (m + n) for m, n in shapes), 3 * 32 + 3
    chain, versions, replied = Chain("key"), {1: ""}, {}
    held = {1: Chain("key")}
    for server_round, answering in enumerate(ANSWERING, 1):
        for since in [None, *range(1, server_round)]:
            there = (held[1] if since is None else held[since]).copy()
            piece = chain.since(there.version) if there.version != chain.version else None
            found = rounds.strategy.payload(sizes, Contact(server_round, 0, since, replied))
            assert (found.initial, found.down, found.up) == (0, head + (piece.numbers if piece else 0), both + head)
            if piece is not None:
                there.follow(piece.arrays, piece.after, chain.version)
                for path, total in chain.total.items():
                    torch.testing.assert_close(there.total[path], total, rtol=0, atol=1e-12)
        _, result = rounds.round(server_round, answering)
        chain.add(server_round, increment(result))
        replied[server_round], versions[server_round + 1] = list(answering), chain.version
        held[server_round + 1] = chain.copy()
    assert len(set(versions.values())) == len(ANSWERING) + 1


def test_from_one_draw_its_first_round_is_that_of_an_exact_residual(here: World) -> None:
    """FLoRA's and FedEx-LoRA's models compute the same after one round; FedIT's does not."""
    for kind in ("bert", "llama"):
        wide = {"model": {"dtype": "float64"}, "run": {"rounds": 1}, "client": {"learning_rate": 2.0, "local_steps": 4}}
        found = {name: here.run(here.content(name, kind, **wide)).logits for name in ("flora", "fedex-lora", "fedit")}
        torch.testing.assert_close(found["flora"], found["fedex-lora"], rtol=0, atol=1e-6)
        assert (found["flora"] - found["fedit"]).abs().max() > 1e-5


def test_clients_evaluate_the_models_that_the_server_has(here: World) -> None:
    """What never goes down is no part of an evaluation either: a client draws it itself."""
    content = here.content(
        "flora", "llama", server={"fraction_evaluate": 1.0, "fraction_train": 0.5}, run={"rounds": 2}
    )
    del content["data"]["test"]
    content["data"] |= {"client_test": 0.3, "partition": {"clients": 3}}
    run = here.run(content)
    shapes = [(32, 32), (48, 32)] * 2  # query and up
    rows = [row for row in run.rows("communication.csv") if row["direction"] == "evaluate_down"]
    assert len(rows) == 6
    # A client that took part in the round lacks its stack alone, of one or two clients.
    of_one = 4 * 2 * sum(m + n for m, n in shapes)
    assert {row["payload_bytes"] for row in rows} <= {0, of_one, 2 * of_one, 3 * of_one}


def test_server_optimizers_that_look_back_are_refused(tmp_path: Path) -> None:
    base = {"data.name": "asset:rotten-tomatoes", "data.partition.clients": 4, "model.name": "asset:minilm-l6"}
    with pytest.raises(InputError, match="changes its coordinates in every round"):
        load_config({"method": {"name": "flora"}}, base | {"server.optimizer": "fedadam"})
