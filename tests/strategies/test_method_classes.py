"""The methods on a small model, two rounds of real training: what is exact, what stays, and what travels."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from fedlora.adapters import AdaptedModel
from fedlora.adapters.model import dense_weight, linear_shape
from fedlora.arrays import Arrays
from fedlora.communication.parts import Parts
from fedlora.communication.wire import decode, digest, encode, payload_bytes, wire_dtype
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.methods import methods
from fedlora.registry import PARAMETERISATIONS
from fedlora.strategies.aggregation import weighted_mean
from fedlora.strategies.base import Contact, FederatedStrategy, Sizes
from fedlora.strategies.fed_sb import mean_gradients
from fedlora.training import train_cohort
from tests import tiny

METHODS = methods()

SIZES = [7, 2, 4]
ROUNDS = 2


def make(
    kind: str, method: str, dtype: str = "float64", **options: Any
) -> tuple[AdaptedModel, Config, FederatedStrategy]:
    config = tiny.settings(
        kind,
        model={"dtype": dtype},
        method={"name": method, "rank": 3, "alpha": 4.5, **options},
        client={"optimizer": "sgd", "local_steps": 3, "batch_size": 4},
    )
    strategy = METHODS[method](config)
    adapted = strategy.adapt(tiny.base_model(kind, getattr(torch, dtype)), config)
    strategy.know(adapted)
    return adapted, config, strategy


def some_data(kind: str, rows: int = 13, seed: int = 0) -> Any:
    table = tiny.table(kind, rows, seed)
    return SimpleNamespace(train=table, public=tiny.table(kind, 6, seed + 1), partition=tiny.split(SIZES))


def begin(adapted: AdaptedModel, strategy: FederatedStrategy, data: Any) -> tuple[Arrays, Arrays]:
    """Do as a run does: the start, divided into what is frozen and what is trained."""
    start = strategy.start_arrays(adapted, data) | adapted.arrays(adapted.head_names)
    start = decode(encode(start, wire_dtype(strategy.config.model.dtype)))
    names = adapted.names(strategy.changing())
    assert names == strategy.trained_names(adapted)
    frozen, trained = ({n: a for n, a in start.items() if (n in names) == kept} for kept in (False, True))
    assert set(trained) == set(names)
    adapted.set_shared(frozen | trained)
    return frozen, trained


def formula_bytes(strategy: FederatedStrategy, adapted: AdaptedModel) -> dict[str, int]:
    """The formula of a client's first contact, and, of what goes both ways, of every later one."""
    parts = Parts("run")
    formula = strategy.client_formula(adapted, parts)
    found = {direction: formula(1, 0, direction) for direction in ("initial", "down", "up")}
    parts.since[0] = 1
    assert all(formula(2, 0, direction) == found[direction] for direction in ("down", "up"))
    return found


def updates(adapted: AdaptedModel, arrays: Arrays) -> Arrays:
    """Each layer's dW."""
    found = {}
    for path, adapter in adapted.adapters.items():
        factors = {name: arrays[f"{path}.{name}"].double() for name in adapter.factors}
        found[path] = PARAMETERISATIONS.get(adapted.kind)().update(factors, {}, adapter.scaling)["weight"]
    return found


@pytest.mark.parametrize("method", list(tiny.FACTORS))
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_rounds_of_training(kind, method):
    """Uneven weights, non-square layers, alpha unlike rank, two rounds; frozen arrays never move by a bit."""
    adapted, config, strategy = make(kind, method, target_modules="all-linear")
    data = some_data(kind)
    frozen, trained = begin(adapted, strategy, data)
    key = digest(frozen)
    weights = [n / sum(SIZES) for n in SIZES]
    for server_round in range(1, ROUNDS + 1):
        jobs = tiny.jobs_of([trained] * 3, tiny.split(SIZES), None, server_round, 0.02)
        results = train_cohort(adapted, data.train, jobs, config)
        # What clients train is what travels, and nothing else has a gradient or an optimiser.
        assert set(results[0].arrays) == set(strategy.trained_names(adapted))
        moving = {id(p) for p in adapted.parameters()}
        assert moving == {id(p) for p in adapted.model.parameters() if p.requires_grad}
        assert not any(id(adapted.parameter(name)) in moving for name in frozen)
        assert digest(adapted.arrays(frozen)) == key
        assert all(tiny.difference(a.arrays, b.arrays) > 1e-4 for a, b in pairwise(results))
        mean = weighted_mean([(r.arrays, r.examples) for r in results])
        assert mean is not None
        parts = [updates(adapted, frozen | result.arrays) for result in results]
        got = updates(adapted, frozen | mean)
        for path in got:
            ideal = sum(w * part[path] for w, part in zip(weights, parts, strict=True))
            if method == "fedit":
                assert (ideal - got[path]).norm() > 1e-9
            else:
                torch.testing.assert_close(got[path], ideal, rtol=0, atol=1e-12)
        adapted.set_shared(mean)
        trained = mean
    assert digest(adapted.arrays(frozen)) == key


@pytest.mark.parametrize("method", ["fedit", "ffa-lora"])
def test_lora_methods_start_at_the_base_model(method):
    adapted, _, strategy = make("bert", method)
    data = some_data("bert")
    batch = data.train.batch(np.arange(5))
    stock = tiny.base_model("bert", torch.float64)
    begin(adapted, strategy, data)
    adapted.layout.set_rows([5])
    with torch.no_grad():
        expected = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert torch.equal(adapted.logits(batch), expected)


def test_a0_is_drawn_for_every_layer_and_from_the_seed_alone():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 17)
        adapted, config, _ = make("bert", "ffa-lora")
        seeded = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
        drawn.append(METHODS["ffa-lora"](seeded).start_arrays(adapted, some_data("bert")))
    first, again, other = drawn
    assert digest(first) == digest(again) != digest(other)
    layers = [value for name, value in first.items() if name.endswith("lora_A")]
    assert len(layers) == 4
    for i, a in enumerate(layers):
        assert 0 < a.abs().max() <= 1 / a.shape[1] ** 0.5
        assert not any(torch.equal(a, b) for b in layers[:i])
    assert not any(value.any() for name, value in first.items() if name.endswith("lora_B"))
    # FedIT and FFA-LoRA start alike, so that they can be compared.
    adapted, config, _ = make("bert", "fedit")
    seeded = config.model_copy(update={"run": config.run.model_copy(update={"seed": 0})})
    assert digest(METHODS["fedit"](seeded).start_arrays(adapted, some_data("bert"))) == digest(first)


def test_the_svd_start_of_fed_sb_reads_no_data():
    adapted, _, strategy = make("gpt2", "fed-sb", target_modules="all-linear")
    arrays = strategy.start_arrays(adapted, None)
    assert strategy.covers_init
    for path, adapter in adapted.adapters.items():
        a, b = arrays[f"{path}.sb_A"], arrays[f"{path}.sb_B"]
        eye = torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(a @ a.T, eye, rtol=0, atol=1e-12)
        torch.testing.assert_close(b.T @ b, eye, rtol=0, atol=1e-12)
        assert not arrays[f"{path}.sb_R"].any()
        values = torch.linalg.svdvals(dense_weight(adapter.base))
        torch.testing.assert_close(torch.diag(b.T @ dense_weight(adapter.base) @ a.T), values[:3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("init", ["public", "pooled"])
@pytest.mark.parametrize("kind", ["mean", "gpt2"])
def test_the_gradient_starts_of_fed_sb(kind, init):
    """dW starts as the best rank-r approximation of one sign step, which lowers the loss."""
    extra = {"data": {"public": "public.csv"}} if init == "public" else {}
    config = tiny.settings(
        kind,
        model={"dtype": "float64"},
        method={
            "name": "fed-sb",
            "rank": 2,
            "alpha": 3.0,
            "init": init,
            "init_learning_rate": 1e-3,
            "init_examples": 50,
        },
        **extra,
    )
    strategy = METHODS["fed-sb"](config)
    adapted = strategy.adapt(tiny.base_model(kind, torch.float64), config)
    data = some_data(kind)
    table, rows = (data.public, np.arange(6)) if init == "public" else (data.train, np.arange(13))
    arrays = strategy.start_arrays(adapted, data)
    assert strategy.covers_init == (init == "public")
    assert not any(p.requires_grad or p.grad is not None for p in adapted.model.parameters())

    # The same gradients by hand, on the stock model.
    stock: Any = tiny.base_model(kind, torch.float64)
    weights = {path: stock.get_submodule(path).weight.requires_grad_() for path in adapted.adapters}

    def loss() -> torch.Tensor:
        batch = table.batch(rows)
        logits = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = [_loss(logits[i : i + 1], batch["labels"][i : i + 1]) for i in range(len(rows))]
        return torch.stack(losses).mean()

    before = loss()
    gradients = torch.autograd.grad(before, list(weights.values()))
    start = updates(adapted, arrays)
    for (path, weight), gradient in zip(weights.items(), gradients, strict=True):
        g = gradient if weight.shape == linear_shape(adapted.adapters[path].base) and kind != "gpt2" else gradient.T
        step = -1e-3 * torch.sign(g)
        values = torch.linalg.svdvals(step)
        assert float((step - start[path]).square().sum()) == pytest.approx(float(values[2:].square().sum()), rel=1e-9)
        torch.testing.assert_close(1.5 * arrays[f"{path}.sb_R"], torch.diag(values[:2]), rtol=0, atol=1e-12)
        with torch.no_grad():
            dense_weight(stock.get_submodule(path)).add_(start[path])
    assert loss() < before
    # The batches in which the gradients are taken do not matter.
    one, many = (mean_gradients(adapted, table, rows, size) for size in (1, 100))
    assert tiny.difference(one, many) < 1e-12


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.dim() == 1:
        return torch.nn.functional.cross_entropy(logits, labels)
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])


def test_the_gradient_start_takes_a_seeded_draw_of_examples():
    config = tiny.settings("bert", method={"name": "fed-sb", "init": "pooled", "init_examples": 5})
    strategy: Any = METHODS["fed-sb"](config)
    table, rows = strategy._start_examples(some_data("bert"))
    assert len(set(rows)) == len(rows) == 5
    assert list(rows) == sorted(rows)
    assert np.array_equal(rows, strategy._start_examples(some_data("bert"))[1])
    assert table is not None
    other: Any = METHODS["fed-sb"](config.model_copy(update={"run": config.run.model_copy(update={"seed": 9})}))
    assert not np.array_equal(rows, other._start_examples(some_data("bert"))[1])
    # Only rows that a client holds are pooled.
    data = some_data("bert")
    data.partition = [np.array([3]), np.array([8, 11])]
    assert list(strategy._start_examples(data)[1]) == [3, 8, 11]
    data.public = None
    public: Any = METHODS["fed-sb"](
        config.model_copy(update={"method": config.method.model_copy(update={"init": "public"})})
    )
    with pytest.raises(InputError, match=r"data\.public"):
        public._start_examples(data)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("method", list(tiny.FACTORS))
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_formulas_equal_what_is_encoded(kind, method, dtype):
    adapted, config, strategy = make(kind, method, dtype, target_modules="all-linear")
    frozen, trained = begin(adapted, strategy, some_data(kind))
    wire = wire_dtype(config.model.dtype)
    size = 8 if dtype == "float64" else 4
    formula = formula_bytes(strategy, adapted)
    assert formula["down"] == formula["up"] == payload_bytes(encode(trained, wire))
    # FedIT's frozen part is empty: A and B travel in every round.
    assert formula["initial"] == payload_bytes(encode(frozen, wire))
    assert formula["up"] == size * sum(array.numel() for array in trained.values())
    # And by this project's table of formulas.
    shapes = [linear_shape(adapter.base) for adapter in adapted.adapters.values()]
    head = 0 if kind in tiny.CAUSAL else 3 * 32 + 3
    r = 3
    numbers = {
        "fedit": (sum(r * (m + n) for m, n in shapes) + head, 0),
        "ffa-lora": (sum(r * m for m, _ in shapes) + head, sum(r * n for _, n in shapes)),
        "fed-sb": (r * r * len(shapes) + head, sum(r * (m + n) for m, n in shapes)),
    }
    assert (formula["up"], formula["initial"]) == tuple(size * number for number in numbers[method])
    # The wire keeps what it carries.
    assert digest(decode(encode(trained, torch.float64))) == digest({n: a.double() for n, a in trained.items()})


def test_the_published_size_of_fed_sb():
    """Mistral-7B, seven linear layers in each of 32, rank 200, fp32: 35,840,000 bytes for R."""
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig())
    config = tiny.settings("llama", method={"name": "fed-sb", "rank": 200, "target_modules": "all-linear"})
    strategy = METHODS["fed-sb"](config)
    adapted = strategy.adapt(model, config)
    assert len(adapted.adapters) == 7 * 32
    formula = formula_bytes(strategy, adapted)
    assert formula["up"] == formula["down"] == 35_840_000
    assert formula["up"] == 4 * sum(adapted.parameter(name).numel() for name in adapted.names(["sb_R"]))
    assert formula["initial"] == 4 * sum(adapted.parameter(name).numel() for name in adapted.names(["sb_A", "sb_B"]))
    # 9 times less than FedIT at rank 32, the comparison that the paper makes.
    fedit = tiny.settings("llama", method={"name": "fedit", "rank": 32, "target_modules": "all-linear"})
    layers = [linear_shape(adapter.base) for adapter in adapted.adapters.values()]
    assert METHODS["fedit"](fedit).payload(Sizes(layers, 32, 0), Contact(1, 0, None, {})).up * 4 / formula[
        "up"
    ] == pytest.approx(9.4, abs=0.1)
