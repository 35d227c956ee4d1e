"""Clients of unlike ranks: what they hold, train, send and pay for, and what the server makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from fedlora.adapters import adapt
from fedlora.arrays import Arrays, leading, padded
from fedlora.clients.half import ClientHalf
from fedlora.communication.parts import residual_sum
from fedlora.config import load_config
from fedlora.errors import InputError
from fedlora.methods import methods
from fedlora.roles import kind_of
from fedlora.strategies.base import get_strategy
from fedlora.strategies.guest import Guest
from fedlora.strategies.ranked import RankedStrategy
from fedlora.strategies.server_app import resolve
from fedlora.study.forecast import forecast
from fedlora.training import train_cohort
from tests import tiny
from tests.small_runs import CLIENTS, WEIGHTS, DrawnRounds, World, world
from tests.small_runs import weights as weights_of

RANKED = [name for name, method in methods().items() if issubclass(method, RankedStrategy)]
NESTED = ["fed-sb", "fedsvd", "ffa-lora"]
RANKS = [1, 3, 2]
OWNED = {"ranks": [1, 3, 2, 1], "rank": 3}
"""Of the owners in a run; rank 3 is the server's."""
BY_HEAD = {"ranks": [2, 6, 4, 2], "rank": 2, "heads": 3}
"""The same for ravan: one head of rank 2, three, two and one."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("ranked")) as made:
        yield made


def owned(method: str) -> dict[str, Any]:
    """Return the keys that give the owners ranks of their own."""
    return BY_HEAD if method == "ravan" else OWNED


def drawn(method: str, kind: str = "bert", dtype: str = "float64") -> DrawnRounds:
    """Return rounds of three clients of ranks 1, 3 and 2."""
    rounds = DrawnRounds(method, kind, dtype, ranks={str(client): rank for client, rank in enumerate(RANKS)})
    rounds.strategy.enrol(["0", "1", "2"])  # type: ignore[attr-defined]
    return rounds


def updates_of(rounds: DrawnRounds, arrays: Arrays, whole: Arrays) -> Arrays:
    """Return s B A, or s B R A, of each layer; what the arrays lack is the leading block of the whole ones."""
    found = {}
    for path, adapter in rounds.adapted.adapters.items():
        rank = min(min(arrays[n].shape) for n in arrays if kind_of(n, ()) in adapter.factors)
        at = rounds.adapted.shapes_at(rank)
        factors = [arrays.get(n, whole[n]) for n in (f"{path}.{f}" for f in adapter.factors)]
        factors = [leading(f, at[f"{path}.{kind}"]) for f, kind in zip(factors, adapter.factors, strict=True)]
        product = factors[0]
        for factor in factors[1:]:
            product = factor @ product
        found[path] = adapter.scaling * product
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("name", NESTED)
def test_nested_ranks_add_the_mean_of_the_updates(name: str, dtype: str, tolerance: float) -> None:
    rounds = drawn(name, "bert", dtype)
    for server_round, answering in enumerate([(0, 1, 2), (0, 2), (0,), (0, 1, 2)], 1):
        before = dict(rounds.arrays)
        sent, result = rounds.round(server_round, answering)
        weights = [WEIGHTS[client] for client in answering]
        shares = [weight / sum(weights) for weight in weights]
        first, last = updates_of(rounds, before, before), updates_of(rounds, rounds.arrays, rounds.arrays)
        moved: dict[str, Any] = dict.fromkeys(first, 0)
        for p, client, arrays in zip(shares, answering, sent, strict=True):
            shapes = rounds.strategy.client_shapes(client)
            held = {n: leading(before[n], shape) for n, shape in shapes.items()}
            start, end = updates_of(rounds, held, before), updates_of(rounds, arrays, before)
            for path in moved:
                moved[path] = moved[path] + p * (end[path] - start[path])
        for path, ideal in moved.items():
            limit = tolerance * max(1.0, float(last[path].abs().max()))
            torch.testing.assert_close(last[path] - first[path], ideal, rtol=0, atol=10 * limit)
        for head in rounds.adapted.head_names:
            mean = sum(p * a[head] for p, a in zip(shares, sent, strict=True))
            torch.testing.assert_close(result[head], mean, rtol=0, atol=10 * tolerance)


def test_padded_values_would_shrink_what_small_clients_do_not_hold() -> None:
    rounds = drawn("ffa-lora")
    rounds.round(1)
    before = dict(rounds.arrays)
    rounds.round(2, (0,))  # of rank 1
    for name in rounds.adapted.names(["lora_B"]):
        assert torch.equal(rounds.arrays[name][:, 1:], before[name][:, 1:])
        assert before[name][:, 1:].abs().max() > 0.1
        assert not torch.equal(rounds.arrays[name][:, :1], before[name][:, :1])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_stack_of_unlike_ranks_is_exact(kind: str) -> None:
    rounds = drawn("flora", kind)
    for server_round, answering in enumerate([(0, 1, 2), (0, 2), (1,)], 1):
        sent, result = rounds.round(server_round, answering)
        total = residual_sum({}, {n: a for n, a in result.items() if ".residual" in n})
        weights = [WEIGHTS[client] for client in answering]
        for path, adapter in rounds.adapted.adapters.items():
            assert [len(a[f"{path}.lora_A"]) for a in sent] == [RANKS[client] for client in answering]
            products = [adapter.scaling * a[f"{path}.lora_B"] @ a[f"{path}.lora_A"] for a in sent]
            ideal = sum(w / sum(weights) * each for w, each in zip(weights, products, strict=True))
            torch.testing.assert_close(total[path], ideal, rtol=0, atol=1e-11)
            assert f"{path}.residual_A" not in result or len(result[f"{path}.residual_A"]) == sum(
                RANKS[client] for client in answering
            )


def test_unlike_ranks_are_truncated_together() -> None:
    rounds = drawn("flexlora")
    for server_round, answering in enumerate([(0, 1, 2), (0, 2), (0,)], 1):
        sent, result = rounds.round(server_round, answering)
        weights = [WEIGHTS[client] for client in answering]
        for path in rounds.adapted.adapters:
            products = [a[f"{path}.lora_B"] @ a[f"{path}.lora_A"] for a in sent]
            ideal = sum(w / sum(weights) * each for w, each in zip(weights, products, strict=True))
            assert isinstance(ideal, torch.Tensor)
            u, s, vh = torch.linalg.svd(ideal)
            b, a = result[f"{path}.lora_B"], result[f"{path}.lora_A"]
            torch.testing.assert_close(b @ a, (u[:, :3] * s[:3]) @ vh[:3], rtol=0, atol=1e-10)
            # What a client of rank 1 is sent is the best that it can hold.
            torch.testing.assert_close(b[:, :1] @ a[:1], s[0] * u[:, :1] @ vh[:1], rtol=0, atol=1e-10)
            # Rows that no client of the round reached are ready to learn again.
            torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-11)


def test_values_are_padded_where_the_paper_does() -> None:
    rounds = drawn("hetlora")
    rounds.round(1)
    for answering, held in (((0, 1, 2), 3), ((0, 2), 2)):
        before = dict(rounds.arrays)
        sent, result = rounds.round(2, answering)
        paths = list(rounds.adapted.adapters)
        norms = [sum((a[f"{p}.lora_B"] @ a[f"{p}.lora_A"]).square().sum() for p in paths) ** 0.5 for a in sent]
        weights = [float(WEIGHTS[c] * norm) for c, norm in zip(answering, norms, strict=True)]
        for path in paths:
            a, old = result[f"{path}.lora_A"], before[f"{path}.lora_A"]
            whole = [padded(arrays[f"{path}.lora_A"], a.shape) for arrays in sent]
            mean = sum(w * each for w, each in zip(weights, whole, strict=True)) / sum(weights)
            assert isinstance(mean, torch.Tensor)
            torch.testing.assert_close(a[:held], mean[:held], rtol=0, atol=1e-12)
            assert torch.equal(a[held:], old[held:]), "rows that no client of the round holds stay"


# Whole runs.


@pytest.mark.parametrize("name", RANKED)
def test_runs_of_unlike_ranks(here: World, name: str) -> None:
    """Bytes are the formula's at every client's own rank, and the forecast's; a resumed run is an uninterrupted one."""
    ranks = owned(name)["ranks"]
    given = here.content(name, "bert", server={"fraction_train": 0.5}, method=owned(name))
    whole, again = here.run(given), here.run(given, stops=(1, 2))
    rows = whole.rows("communication.csv")
    assert rows == again.rows("communication.csv")
    assert all(row["payload_bytes"] == row["formula_bytes"] for row in rows)
    first, second = whole.arrays(), again.arrays()
    assert all(torch.equal(array, second[key]) for key, array in first.items())
    expected = forecast(whole.config)
    sizes = {"initial": expected.initial_bytes, "down": expected.downlink_bytes, "up": expected.uplink_bytes}
    for way, size in sizes.items():
        assert size == sum(row["payload_bytes"] for row in rows if row["direction"] == way)
    assert expected.ranks == ranks
    ups = {(row["client"], row["payload_bytes"]) for row in rows if row["direction"] == "up"}
    assert len(ups) == len({client for client, _ in ups}), "a client sends as much in every round"
    by_rank = {ranks[client]: size for client, size in ups}
    assert sorted(by_rank.values()) == [size for _, size in sorted(by_rank.items())]
    assert len(set(by_rank.values())) == len(by_rank) > 1


@pytest.mark.parametrize("uncounted", [(), (2, 3)])
def test_a_rank_that_falls_from_round_to_round(here: World, uncounted: tuple[int, ...]) -> None:
    """Messages shrink by the formula, a resumed run is an uninterrupted one, and the adapter has the last rank."""
    method = {"rank": 4, "final_rank": 1, "ranks": [4, 2, 4, 4]}
    given = here.content("flexlora", "llama", server={"fraction_train": 0.5}, method=method)
    whole, again = here.run(given, uncounted=uncounted), here.run(given, uncounted=uncounted, stops=(1, 2))
    rows = whole.rows("communication.csv")
    assert rows == again.rows("communication.csv")
    assert all(row["payload_bytes"] == row["formula_bytes"] for row in rows)
    first, second = whole.arrays(), again.arrays()
    assert all(torch.equal(array, second[key]) for key, array in first.items())
    up = {row["round"]: row["payload_bytes"] for row in rows if row["direction"] == "up" and row["client"] != 1}
    assert sorted(set(up.values()), reverse=True) == [up[r] for r in sorted(up)], "rounds of rank 4, 3 and 2"
    exported = json.loads((whole.folder / "adapter" / "adapter_config.json").read_text())
    assert exported["r"] == (3 if uncounted else 1)


def test_formulas_hold_for_a_codec_and_clients_are_measured_from_what_they_got(here: World) -> None:
    given = here.content("fedsvd", "bert", method=OWNED, wire={"codec": "int8"}, server={"fraction_train": 0.5})
    run = here.run(given)
    rows = run.rows("communication.csv")
    assert all(row["payload_bytes"] == row["formula_bytes"] for row in rows)
    plain = here.run(here.content("fedsvd", "bert", method=OWNED, server={"fraction_train": 0.5}))
    assert (
        sum(r["payload_bytes"] for r in rows) < sum(r["payload_bytes"] for r in plain.rows("communication.csv")) * 0.7
    )
    losses = [r.summary["final"]["loss"] for r in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("name", ["ffa-lora", "ravan"])
def test_updates_that_are_sent_whole_give_the_same_result(here: World, name: str) -> None:
    """The server adds to each client's update what it sent to that client."""
    given = here.content(name, "bert", method=owned(name), server={"fraction_train": 0.5})
    run = here.run(given | {"wire": {"uplink_codec": "topk", "topk_fraction": 1.0}})
    assert all(row["payload_bytes"] == row["formula_bytes"] for row in run.rows("communication.csv"))
    assert tiny.difference(run.arrays(), here.run(given).arrays()) <= 1e-5


def test_another_strategy_would_not_know_the_ranks() -> None:
    config = resolve(tiny.settings("bert", method={"name": "ffa-lora", "rank": 3, "ranks": {"0": 1, "1": 3}}))
    with pytest.raises(InputError, match="no plain averaging"):
        Guest(FedAvg(), get_strategy("ffa-lora")(config))


@pytest.mark.parametrize("name", ["fedsvd", "flexlora", "hetlora"])
def test_another_strategy_would_not_make_the_methods_own_aggregate(name: str) -> None:
    """It would average the factors, under the method's name."""
    config = resolve(tiny.settings("bert", method={"name": name}))
    with pytest.raises(InputError, match="no plain averaging"):
        Guest(FedAvg(), get_strategy(name)(config))


@pytest.mark.parametrize("name", ["ffa-lora", "fed-sb", "la-lora", "ravan"])
def test_another_strategy_may_average(name: str) -> None:
    config = resolve(tiny.settings("bert", method={"name": name, "rank": 2}))
    Guest(FedAvg(), get_strategy(name)(config))


@pytest.mark.parametrize("privacy", [False, True])
@pytest.mark.parametrize("name", ["ffa-lora", "fed-sb", "flora", "ravan"])
def test_clients_of_one_cohort_are_grouped_by_rank(here: World, name: str, privacy: bool) -> None:
    noise = {"mode": "example", "noise_multiplier": 1.0, "max_grad_norm": 0.5, "target_delta": 1e-2}
    mode = {"privacy": noise} if privacy else {}
    given = here.content(name, "bert", model={"dtype": "float64"}, method=owned(name), **mode)
    alone, together = here.run(given), here.run(given | {"simulation": {"workers": 0, "cohort_size": 4}})
    assert alone.rows("communication.csv") == together.rows("communication.csv")
    assert tiny.difference(alone.arrays(), together.arrays()) <= 1e-9
    if name != "ravan":  # each head is averaged over those that hold it
        assert max(alone.errors) <= 1e-12, "the mean of the clients' updates"


@pytest.mark.parametrize(("name", "rank"), [("fedsvd", 2), ("hetlora", 2), ("ravan", 8)])
def test_the_servers_rank_for_all_is_no_ranks(here: World, name: str, rank: int) -> None:
    """To the bit, where the method does not go by moves; else to rounding."""
    plain = here.content(name, "bert", model={"dtype": "float64"})
    same = plain | {"method": {**plain["method"], "ranks": [rank] * len(CLIENTS)}}
    assert tiny.difference(here.run(plain).arrays(), here.run(same).arrays()) <= 1e-6


def test_ranks_by_name_and_by_profile(here: World) -> None:
    named = here.content("ffa-lora", "bert", method={"rank": 3, "ranks": {"ann": 1, "bob": 3, "2": 2, "dee": 1}})
    run = here.run(named)
    assert run.summary["rounds"] == 3
    listed = here.run(here.content("ffa-lora", "bert", method=OWNED))
    assert run.rows("communication.csv") == listed.rows("communication.csv")
    profile = here.run(here.content("ffa-lora", "bert", method={"rank": 3, "device_profile": {"1": 0.5, "3": 0.5}}))
    sizes = {row["payload_bytes"] for row in profile.rows("communication.csv") if row["direction"] == "up"}
    assert len(sizes) == 2


@pytest.mark.parametrize(
    ("name", "kind"), [("ffa-lora", "bert"), ("flora", "llama"), ("flexlora", "llama"), ("ravan", "bert")]
)
def test_clients_evaluate_the_model_that_they_hold(here: World, name: str, kind: str) -> None:
    server = {"fraction_evaluate": 1.0, "fraction_train": 0.5}
    method = {**owned(name), "ranks": owned(name)["ranks"][:3]}
    given = here.content(name, kind, server=server, run={"rounds": 2}, method=method)
    del given["data"]["test"]
    given["data"] |= {"client_test": 0.3, "partition": {"clients": 3}}
    run = here.run(given)
    for line in run.lines():
        told = line["metrics"]["clients"]
        assert (told["clients"], told["failed"]) == (3, 0)
    rows = run.rows("communication.csv")
    assert all(row["payload_bytes"] == row["formula_bytes"] for row in rows if "evaluate" not in row["direction"])
    down = {(row["client"], row["payload_bytes"]) for row in rows if row["direction"] == "evaluate_down"}
    assert name == "flora" or dict(down)[0] < dict(down)[2] < dict(down)[1]


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"ranks": [1, 2, 3, 4]}, "method.ranks", "no rank from 1 to method.rank = 3"),
        ({"ranks": [1, 2, 3, "full"]}, "method.ranks", "give a number"),
        ({"ranks": [1, 2]}, "method.ranks", "one rank for each of the 4 clients"),
        ({"device_profile": {"4": 1.0}}, "method.device_profile", "no rank from 1 to method.rank = 3"),
        ({"device_profile": {"2": 0.5}}, "method.device_profile", "sum to 1"),
        ({"ranks": [1, 2, 3, 1], "device_profile": {"2": 1.0}}, "method.ranks", "not both"),
    ],
)
@pytest.mark.parametrize("name", ["fed-sb", "flora"])
def test_ranks_that_cannot_be(name: str, options: dict[str, Any], field: str, words: str) -> None:
    content = {
        "model": {"name": "asset:minilm-l6"},
        "data": {"name": "asset:rotten-tomatoes", "partition": {"clients": 4}},
        "method": {"name": name, "rank": 3, **options},
    }
    with pytest.raises(InputError, match=words) as caught:
        load_config(content)
    assert caught.value.field == field


def test_a_server_cannot_ask_for_a_larger_rank() -> None:
    config = resolve(tiny.settings("bert", method={"name": "ffa-lora", "rank": 3, "ranks": [1, 3]}))
    half = ClientHalf(adapt(tiny.base_model("bert"), config, "lora"), config)
    half.prepare({"rank": 2})
    for rank in (0, 4, 10**9):
        with pytest.raises(InputError, match=r"no rank from 1 to method\.rank = 3"):
            half.prepare({"rank": rank})


# The model at a rank.


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_model_at_a_rank_is_one_with_zeros_beyond_it(kind: str) -> None:
    config = resolve(tiny.settings(kind, method={"name": "ffa-lora", "rank": 3, "alpha": 5.0}))
    model = adapt(tiny.base_model(kind, torch.float64), config, "lora")
    values = model.drawn(0)
    small = {n: leading(a, model.shapes_at(2).get(n, a.shape)) for n, a in values.items()}
    cut = {n: padded(small[n], a.shape) if n in model.shapes_at(2) else a for n, a in values.items()}
    model.set_shared(cut)
    whole = weights_of(model)
    model.set_rank(2)
    model.set_shared(small)
    assert tiny.difference(weights_of(model), whole) <= 1e-12
    # Every rank keeps its own values; the head is that of all.
    model.set_rank(3)
    assert tiny.difference(weights_of(model), whole) <= 1e-12
    model.set_rank(1)
    assert not any(model.parameter(n).any() for n in model.shapes_at(1))


@pytest.mark.parametrize("name", ["ffa-lora", "ravan"])
def test_noise_and_clipping_are_those_of_a_model_of_that_rank(name: str) -> None:
    """The steps are, to the bit, those of a model that never had more: nothing reaches what a client does not hold."""

    def trained(**method: float) -> Arrays:
        privacy = {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-2}
        client = {"optimizer": "sgd", "local_steps": 3, "batch_size": 4}
        sections = {"method": {"name": name, **method}, "privacy": privacy, "client": client}
        config = resolve(tiny.settings("bert", **sections))
        strategy = get_strategy(name)(config)
        model = strategy.adapt(tiny.base_model("bert"), config)
        model.set_rank(2)
        generator = torch.Generator().manual_seed(0)
        values = {n: torch.randn(shape, generator=generator) for n, shape in model.shapes_at(2).items()}
        model.set_shared(values)
        start = values | model.arrays(model.head_names)
        start = {n: start[n] for n in strategy.trained_names(model)}
        jobs = tiny.jobs_of([start], [np.arange(8)], [tiny.plan(sigma=1.0, clip=0.1, rate=0.5, batch=4.0)])
        return train_cohort(model, tiny.table("bert", 8), jobs, config)[0].arrays

    if name == "ravan":
        small, cut = trained(rank=1, alpha=1.0, heads=2), trained(rank=1, alpha=1.0, heads=4)
    else:
        small, cut = trained(rank=2, alpha=2.0), trained(rank=4, alpha=4.0)
    assert small.keys() == cut.keys()
    assert all(torch.equal(array, cut[name]) for name, array in small.items())


def test_blocks() -> None:
    array = torch.arange(12.0).reshape(3, 4)
    block = leading(array, (2, 3))
    assert padded(block, (3, 4)).tolist() == [[0, 1, 2, 0], [4, 5, 6, 0], [0, 0, 0, 0]]
    assert padded(array, (3, 4)) is array
