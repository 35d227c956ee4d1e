"""RAVAN: one head is Fed-SB, several are a block-diagonal R, and the mean is exact with scales that were trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import nn

from fedlora.adapters import RowLayout
from fedlora.adapters.layers import FactoredLinear
from fedlora.adapters.model import dense_weight, linear_shape
from fedlora.adapters.parameterisations import heads
from fedlora.adapters.parameterisations.heads import Heads
from fedlora.arrays import Arrays, leading, padded
from fedlora.clients.ravan import ScalingHalf
from fedlora.errors import InputError
from fedlora.strategies.base import Contact, Payload
from fedlora.strategies.ranked import RankedStrategy
from tests import tiny
from tests.small_runs import WEIGHTS, DrawnRounds, World, weights, world

SHARES = [weight / sum(WEIGHTS) for weight in WEIGHTS]
ONE_HEAD = {"name": "ravan", "heads": 1, "train_scales": False}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("heads")) as made:
        yield made


@pytest.mark.parametrize("privacy", [False, True])
def test_one_head_without_a_scale_is_fed_sb(here: World, privacy: bool) -> None:
    sections: dict[str, Any] = {"model": {"dtype": "float64"}, "client": {"learning_rate": 0.5}}
    if privacy:
        sections["privacy"] = {"mode": "example", "noise_multiplier": 0.7, "target_delta": 1e-2}
    square = here.run(here.content("fed-sb", "bert", **sections))
    one = here.run(here.content("ravan", "bert", **sections, method=ONE_HEAD))
    # Per-example gradients are the same sums in another shape.
    assert tiny.difference(one.arrays(), square.arrays()) <= (1e-12 if privacy else 0.0)
    assert one.rows("communication.csv")[0].keys() == square.rows("communication.csv")[0].keys()
    bytes_of = [[row["payload_bytes"] for row in run.rows("communication.csv")] for run in (one, square)]
    assert bytes_of[0] == bytes_of[1]


def test_the_adapter_has_the_rank_of_all_heads(here: World) -> None:
    run = here.run(here.content("ravan", "bert", method={"heads": 3}))
    settings = json.loads(Path(run.folder, "adapter", "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (6, 9.0)
    blocks = [a for name, a in run.arrays().items() if name.endswith("lora_B.weight")]
    assert max(int(torch.linalg.matrix_rank(b)) for b in blocks) == 6, "more than one head learned"


SHAPES = st.fixed_dictionaries(
    {
        "counts": st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any),
        "tokens": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "rank": st.integers(1, 2),
        "seed": st.integers(0, 1000),
    }
)


@given(SHAPES)
def test_several_heads_are_a_block_diagonal_matrix_by_client(shape: dict[str, Any]) -> None:
    """Outputs, the gradients of a client, and those of each example, against dense matrices and autograd."""
    generator = torch.Generator().manual_seed(shape["seed"])

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    counts, number, rank = shape["counts"], shape["heads"], shape["rank"]
    layout, clients, rows = RowLayout(), len(shape["counts"]), sum(shape["counts"])
    layout.set_rows(counts)
    layer = _layer(number, rank, layout)
    owners = [k for k, count in enumerate(counts) for _ in range(count)]
    layer.heads_A.weight = nn.Parameter(draw(1, number * rank, 7), False)
    layer.heads_B.weight = nn.Parameter(draw(1, 9, number * rank), False)
    layer.heads_H.weight = nn.Parameter(draw(clients, number, rank, rank))
    layer.heads_s.weight = nn.Parameter(draw(clients, number))
    x, out = draw(rows, shape["tokens"], 7), draw(rows, shape["tokens"], 9)
    trained = [layer.heads_H.weight, layer.heads_s.weight]
    dense = [torch.block_diag(*(trained[1][k][:, None, None] * trained[0][k])) for k in owners]
    b, a = layer.heads_B.weight[0], layer.heads_A.weight[0]
    each = [(out[i] * (x[i] @ (layer.base.weight + 0.7 * b @ dense[i] @ a).T)).sum() for i in range(rows)]
    expected = torch.stack(
        [torch.cat([g.flatten(1) for g in torch.autograd.grad(e, trained, retain_graph=True)], 1) for e in each]
    )
    hooks = GradSampleHooks(layer, loss_reduction="sum")
    y = layer(x)
    loss = (out * y).sum()
    torch.testing.assert_close(loss, torch.stack(each).sum(), rtol=1e-10, atol=1e-10)
    loss.backward()
    summed = torch.cat([p.grad.flatten(1) for p in trained if p.grad is not None], 1)
    torch.testing.assert_close(summed, expected.sum(0), rtol=0, atol=1e-10)
    samples = torch.cat([p.grad_sample.flatten(1) for p in trained], 1)  # type: ignore[attr-defined]
    hooks.cleanup()
    of_owner = torch.stack([expected[i, k] for i, k in enumerate(owners)])
    torch.testing.assert_close(samples, of_owner, rtol=0, atol=1e-10)


def _layer(number: int, rank: int, layout: RowLayout) -> Any:
    base = nn.Linear(7, 9, bias=False, dtype=torch.float64)
    factors: dict[str, Any] = dict(Heads().shapes(9, 7, rank, number))
    factors["heads_H"] = heads.StackedBlocks(number, rank, layout, torch.float64)
    factors["heads_s"] = heads.StackedScales(number, layout, torch.float64)
    return FactoredLinear(base.requires_grad_(False), factors, 0.7, layout)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_mean_is_exact_with_trained_scales(kind: str, dtype: str, tolerance: float) -> None:
    """Clients end at drawn H and s; what leaves them is the product, and dW of the mean is the mean of their dWs."""
    rounds = DrawnRounds("ravan", kind, dtype, heads=3)
    half = ScalingHalf(rounds.adapted, rounds.config)
    generator = torch.Generator().manual_seed(1)
    ideal: dict[str, torch.Tensor] = {}
    for server_round in (1, 2):
        sent, result = rounds.round(server_round)
        ones = {n: a for n, a in result.items() if n.endswith("heads_s")}
        assert ones
        assert all(bool((array == 1).all()) for array in ones.values()), "the scales return to 1"
        assert all(set(a) == {*rounds.adapted.names(["heads_H"]), *rounds.adapted.head_names} for a in sent)
        ideal = {}
        left: list[Arrays] = []
        for share, arrays in zip(SHARES, sent, strict=True):
            scales = {
                n.replace("heads_H", "heads_s"): torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
                for n in rounds.adapted.names(["heads_H"])
            }
            scales = {n: s.to(arrays[n.replace("heads_s", "heads_H")].dtype) for n, s in scales.items()}
            trained = arrays | scales
            left.append(half.finish(trained))
            for path in rounds.adapted.adapters:
                part = share * _update(rounds, path, trained)
                ideal[path] = ideal[path] + part if path in ideal else part
        for path in rounds.adapted.adapters:
            name = f"{path}.heads_H"
            mean = {name: sum(p * a[name] for p, a in zip(SHARES, left, strict=True))}
            found = _update(rounds, path, {**mean, f"{path}.heads_s": torch.ones(3, dtype=mean[name].dtype)})
            largest = max(1.0, float(ideal[path].abs().max()))
            torch.testing.assert_close(found, ideal[path], rtol=0, atol=tolerance * largest)
            # What the server makes of what comes is that mean.
            server = sum(p * a[name] for p, a in zip(SHARES, sent, strict=True))
            torch.testing.assert_close(result[name], server, rtol=0, atol=tolerance * 10)


def _update(rounds: DrawnRounds, path: str, arrays: Arrays) -> torch.Tensor:
    factors = {f: arrays.get(f"{path}.{f}", rounds.arrays.get(f"{path}.{f}")) for f in Heads().shapes(1, 1, 1)}
    scaling = rounds.config.scaling()
    assert scaling == 1.5
    frozen = {"weight": dense_weight(rounds.adapted.adapters[path].base)}
    return Heads().update(factors, frozen, scaling)["weight"]  # type: ignore[arg-type]


def test_what_comes_gets_scales_of_one_and_what_leaves_has_none() -> None:
    rounds = DrawnRounds("ravan", heads=2)
    half = ScalingHalf(rounds.adapted, rounds.config)
    name = next(iter(rounds.adapted.adapters))
    came = {f"{name}.heads_H": torch.ones(2, 3, 3), "classifier.weight": torch.ones(3, 32)}
    began = half.begin(came)
    assert began.keys() - came.keys() == {f"{name}.heads_s"}
    assert torch.equal(began[f"{name}.heads_s"], torch.ones(2))
    began[f"{name}.heads_s"] = torch.tensor([2.0, -1.0])
    left = half.finish(began)
    assert left.keys() == came.keys()
    assert torch.equal(left[f"{name}.heads_H"][:, 0, 0], torch.tensor([2.0, -1.0]))
    assert torch.equal(left["classifier.weight"], came["classifier.weight"])
    frozen = DrawnRounds("ravan", heads=2, train_scales=False)
    assert ScalingHalf(frozen.adapted, frozen.config).begin(came) == came
    assert "heads_s" not in {n.rpartition(".")[2] for n in frozen.arrays}


@pytest.mark.parametrize("init", ["svd", "orthogonal"])
def test_the_start_is_the_base_model_with_orthonormal_factors(init: str) -> None:
    rounds = DrawnRounds("ravan", "llama", heads=4, init=init)
    seen: list[torch.Tensor] = []
    for path, adapter in rounds.adapted.adapters.items():
        a, b = rounds.arrays[f"{path}.heads_A"], rounds.arrays[f"{path}.heads_B"]
        eye = torch.eye(12, dtype=torch.float64)
        torch.testing.assert_close(a @ a.T, eye, rtol=0, atol=1e-12)
        torch.testing.assert_close(b.T @ b, eye, rtol=0, atol=1e-12)
        assert not rounds.arrays[f"{path}.heads_H"].any()
        assert not any(a.shape == other.shape and torch.equal(a, other) for other in seen)
        seen.append(a)
        if init == "svd":
            # Head h has the singular vectors h, h + 4 and h + 8.
            w = dense_weight(adapter.base)
            values = torch.linalg.svdvals(w)[:12].reshape(3, 4).T.reshape(-1)
            torch.testing.assert_close(b.T @ w @ a.T, torch.diag(values), rtol=0, atol=1e-11)


def test_bytes() -> None:
    rounds = DrawnRounds("ravan", heads=4)
    sizes = rounds.strategy.sizes(rounds.adapted)
    shapes = [linear_shape(adapter.base) for adapter in rounds.adapted.adapters.values()]
    numbers = len(shapes) * 4 * 3 * 3 + 3 * 32 + 3
    once = sum(4 * 3 * (m + n) for m, n in shapes)
    assert rounds.strategy.payload(sizes, Contact(1, 0, None, {})) == Payload(once, numbers, numbers)
    # Four times the numbers of a square matrix of rank 3, for four times its rank.
    assert rounds.strategy.trained_numbers(rounds.adapted) == numbers + 4 * len(shapes)


# Clients with some of the heads.


def by_head(ranks: Sequence[int], **options: Any) -> DrawnRounds:
    """Return rounds of three clients of these ranks, of three heads of rank 2."""
    rounds = DrawnRounds("ravan", rank=2, heads=3, ranks=dict(zip("012", ranks, strict=True)), **options)
    assert isinstance(rounds.strategy, RankedStrategy)
    rounds.strategy.enrol(["0", "1", "2"])
    return rounds


@pytest.mark.parametrize("train_scales", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_a_head_moves_by_the_mean_of_those_who_hold_it(dtype: str, tolerance: float, train_scales: bool) -> None:
    """In dW, against plain sums: head by head, and a head that nobody of the round holds stays to the bit."""
    rounds = by_head([2, 6, 4], dtype=dtype, alpha=3.0, train_scales=train_scales)
    for server_round, answering in enumerate([(0, 1, 2), (0, 2), (0,), (1,)], 1):
        before = dict(rounds.arrays)
        sent, result = rounds.round(server_round, answering)
        for path in rounds.adapted.adapters:
            b, a = (before[f"{path}.{factor}"].double() for factor in ("heads_B", "heads_A"))
            for head in range(3):
                part = slice(2 * head, 2 * head + 2)
                old, new = before[f"{path}.heads_H"][head], result[f"{path}.heads_H"][head]
                holders = [
                    (WEIGHTS[client], arrays[f"{path}.heads_H"][head])
                    for client, arrays in zip(answering, sent, strict=True)
                    if len(arrays[f"{path}.heads_H"]) > head
                ]
                if not holders:
                    assert torch.equal(new, old)
                    continue
                total = sum(weight for weight, _ in holders)
                moves = [w / total * 1.5 * b[:, part] @ (h - old).double() @ a[part] for w, h in holders]
                found = 1.5 * b[:, part] @ (new - old).double() @ a[part]
                torch.testing.assert_close(found, torch.stack(moves).sum(0), rtol=0, atol=10 * tolerance)
        shares = [WEIGHTS[client] / sum(WEIGHTS[c] for c in answering) for client in answering]
        for name in rounds.adapted.head_names:
            mean = torch.stack([p * arrays[name] for p, arrays in zip(shares, sent, strict=True)]).sum(0)
            torch.testing.assert_close(result[name], mean, rtol=0, atol=10 * tolerance)


def test_all_heads_for_all_clients_is_the_plain_mean_to_the_bit() -> None:
    plain, same = DrawnRounds("ravan", dtype="float32", rank=2, heads=3), by_head([6, 6, 6], dtype="float32")
    for server_round in (1, 2):
        for rounds in (plain, same):
            rounds.round(server_round)
        assert all(torch.equal(array, same.arrays[name]) for name, array in plain.arrays.items())


def test_a_client_has_the_first_heads_and_pays_for_them_alone() -> None:
    rounds = by_head([2, 6, 4])
    strategy, layers = rounds.strategy, len(rounds.adapted.adapters)
    strategy.enter(1, 1)
    sizes = strategy.sizes(rounds.adapted)
    shapes = [linear_shape(adapter.base) for adapter in rounds.adapted.adapters.values()]
    for client, held in enumerate([1, 3, 2]):
        numbers = layers * held * 2 * 2 + 3 * 32 + 3
        once = sum(held * 2 * (m + n) for m, n in shapes)
        own = strategy.client_sizes(sizes, client)
        assert strategy.payload(own, Contact(1, client, None, {})) == Payload(once, numbers, numbers)
        sent = strategy.client_shapes(client)
        assert {sent[name] for name in rounds.adapted.names(["heads_H"])} == {(held, 2, 2)}
    # Its model is the whole one with the other heads' matrices at 0, and it may scale what it holds.
    model = rounds.adapted
    values = model.drawn(0) | {n: torch.ones(3) for n in model.names(["heads_s"])}
    cut = {n: padded(a[:1], a.shape) if n.endswith("heads_H") else a for n, a in values.items()}
    model.set_shared(cut)
    whole = weights(model)
    half = ScalingHalf(model, rounds.config)
    half.prepare({"rank": 2})
    small = {n: leading(values[n], shape) for n, shape in model.shapes_at(2).items()}
    model.set_shared(half.begin({n: a for n, a in small.items() if not n.endswith("heads_s")}))
    assert tiny.difference(weights(model), whole) <= 1e-12
    for rank in (0, 1, 3, 8):
        with pytest.raises(InputError, match=r"no multiple of method\.rank = 2 up to 6, the rank of all heads"):
            half.prepare({"rank": rank})


@pytest.mark.parametrize("option", [{"ranks": [2, 3]}, {"ranks": [2, 8]}, {"device_profile": {"1": 1.0}}])
def test_ranks_that_are_no_heads_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"no multiple of method\.rank = 2 up to 6") as caught:
        tiny.settings("bert", method={"name": "ravan", "rank": 2, "heads": 3, **option})
    assert caught.value.field == f"method.{next(iter(option))}"


def test_more_ranks_than_a_layer_has_are_refused() -> None:
    with pytest.raises(InputError, match=r"method\.heads = 4: heads of rank 9 are above the size of .* \(32 x 32\)"):
        DrawnRounds("ravan", rank=9, heads=4)
