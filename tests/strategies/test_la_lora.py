"""LA-LoRA: a local step trains one factor, is clipped by what it trains, and steps by a smoothed gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapters.model import linear_shape
from fedlora.arrays import Arrays
from fedlora.clients.la_lora import Alternating, smoothed
from fedlora.roles import HEAD
from fedlora.strategies.base import Contact, Payload
from fedlora.training import StepRule, train_cohort
from fedlora.training import cohort as training
from tests import tiny
from tests.small_runs import WEIGHTS, DrawnRounds

SHARES = [weight / sum(WEIGHTS) for weight in WEIGHTS]
FACTORS = ("lora_A", "lora_B")


def trained(steps: int, rule: StepRule | None, *, private: bool = False, sigma: float = 0.0, **client: Any) -> Any:
    """Return a client's arrays before and after some steps on whole batches, by kind."""
    config = tiny.settings(client={"optimizer": "sgd", "local_steps": steps, "batch_size": 6, **client})
    adapted = tiny.adapted_model("bert", config, torch.float64)
    names = tiny.trained_names(adapted, config)
    start = adapted.arrays(names)
    plans = [tiny.plan(sigma, 0.05, 1.0, 6.0)] if private else None
    jobs = tiny.jobs_of([start], tiny.split([6]), plans)
    (result,) = train_cohort(adapted, tiny.table("bert", 6), jobs, config, rule)
    return _by_kind(start, adapted.head_names), _by_kind(result.arrays, adapted.head_names)


def _by_kind(arrays: Arrays, head: tuple[str, ...]) -> dict[str, Arrays]:
    kinds: dict[str, Arrays] = {}
    for name, array in arrays.items():
        kinds.setdefault(HEAD if name in head else name.rpartition(".")[2], {})[name] = array
    return kinds


def same(first: Arrays, second: Arrays) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("private", [False, True])
def test_steps_train_the_factors_in_turns(private: bool, optimizer: str) -> None:
    """Nothing else moves a factor out of its turn: no noise, momentum or decay."""
    more = {"optimizer": optimizer, "weight_decay": 0.1} | ({"momentum": 0.9} if optimizer == "sgd" else {})
    runs = [trained(steps, Alternating(False), private=private, sigma=1.0, **more) for steps in (1, 2, 3)]
    start, (one, two, three) = runs[0][0], [after for _, after in runs]
    assert same(start["lora_A"], one["lora_A"])
    assert not same(start["lora_B"], one["lora_B"])
    assert same(one["lora_B"], two["lora_B"])
    assert not same(one["lora_A"], two["lora_A"])
    assert same(two["lora_A"], three["lora_A"])
    assert not same(two["lora_B"], three["lora_B"])
    for before, later in ((start, one), (one, two), (two, three)):
        assert not same(before[HEAD], later[HEAD])


def test_a_step_is_that_of_the_trained_arrays_alone() -> None:
    """Clipped to the norm of what it trains: one step is that of a method which never trains A, to the bit of B."""
    config = tiny.settings(method={"name": "ffa-lora"}, client={"optimizer": "sgd", "local_steps": 1, "batch_size": 6})
    adapted = tiny.adapted_model("bert", config, torch.float64)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    jobs = tiny.jobs_of([start], tiny.split([6]), [tiny.plan(0.0, 0.05, 1.0, 6.0)])
    (frozen_a,) = train_cohort(adapted, tiny.table("bert", 6), jobs, config)
    before, after = trained(1, Alternating(False), private=True)
    expected = _by_kind(frozen_a.arrays, adapted.head_names)
    for kind in ("lora_B", HEAD):
        assert tiny.difference(after[kind], expected[kind]) <= 1e-12
    both = trained(1, None, private=True)[1]
    assert tiny.difference(both["lora_B"], after["lora_B"]) > 1e-9, "a norm that counts A clips more"
    # Every example is above C = 0.05 here, so that the step is no longer than the rate times C.
    moved = torch.cat([(after[k][n] - before[k][n]).flatten() for k in ("lora_B", HEAD) for n in before[k]])
    assert 0 < float(moved.norm()) <= 0.1 * 0.05 * (1 + 1e-9)


def test_the_noise_of_a_step_is_that_of_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of one factor have unlike noise, and what a step does not train has none."""
    monkeypatch.setattr(training, "_losses", lambda adapted, table, rows, pack_to: _flat(adapted, rows))
    start, one = trained(1, Alternating(False), private=True, sigma=2.0)
    three = trained(3, Alternating(False), private=True, sigma=2.0)[1]
    for name, array in start["lora_B"].items():
        first = one["lora_B"][name] - array
        third = three["lora_B"][name] - one["lora_B"][name]
        assert not torch.allclose(first, third, rtol=0, atol=1e-6)
    drawn = torch.cat([(one["lora_B"][n] - a).flatten() for n, a in start["lora_B"].items()])
    assert float(drawn.std()) == pytest.approx(0.1 * 2.0 * 0.05 / 6.0, rel=0.15)


def _flat(adapted: Any, rows: Any) -> torch.Tensor:
    """Return losses without a gradient: what moves is the noise."""
    batch = {"input_ids": torch.full((sum(map(len, rows)), 3), 4)}
    adapted.layout.set_rows([len(r) for r in rows])
    return adapted.logits(batch).sum(-1) * 0


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 1000))
def test_smoothing_is_a_weighted_mean_along_one_side_of_each_client(rows: int, columns: int, k: int, seed: int) -> None:
    values = torch.randn(k, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for axis, length in ((-1, columns), (-2, rows)):
        matrix = torch.zeros(length, length, dtype=torch.float64)
        for i in range(length):
            for offset, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
                matrix[i, min(max(i + offset, 0), length - 1)] += weight / 16
        expected = values @ matrix.T if axis == -1 else matrix @ values
        torch.testing.assert_close(smoothed(values, axis), expected, rtol=0, atol=1e-12)
    ones = torch.ones(1, rows, columns)
    assert torch.equal(smoothed(ones, -1), ones)


def test_a_gradient_is_smoothed_along_its_long_side_and_the_heads_is_not() -> None:
    rule = Alternating(True)
    impulse = torch.zeros(2, 1, 9)
    impulse[1, 0, 4] = 16.0
    line = torch.tensor([0.0, 0, 1, 4, 6, 4, 1, 0, 0])
    got = rule.gradient("lora_A", impulse)
    assert not got[0].any(), "clients never mix"
    assert torch.equal(got[1, 0], line)
    assert torch.equal(rule.gradient("lora_B", impulse.transpose(1, 2))[1, :, 0], line)
    assert rule.gradient(HEAD, impulse) is impulse
    assert Alternating(False).gradient("lora_A", impulse) is impulse


@pytest.mark.parametrize("private", [False, True])
def test_smoothing_is_linear_in_the_step(private: bool) -> None:
    """With one step of plain descent B moves by the smoothed move, noise included, and the head as without."""
    start, rough = trained(1, Alternating(False), private=private, sigma=1.0)
    _, smooth = trained(1, Alternating(True), private=private, sigma=1.0)
    for name, array in start["lora_B"].items():
        moved = smoothed((rough["lora_B"][name] - array)[None], -2)[0]
        torch.testing.assert_close(smooth["lora_B"][name] - array, moved, rtol=0, atol=1e-12)
    assert same(rough[HEAD], smooth[HEAD])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_both_factors_are_averaged(dtype: str, tolerance: float) -> None:
    rounds = DrawnRounds("la-lora", "llama", dtype)
    for server_round in (1, 2):
        sent, result = rounds.round(server_round)
        for name in rounds.adapted.names(FACTORS):
            mean = sum(p * arrays[name] for p, arrays in zip(SHARES, sent, strict=True))
            torch.testing.assert_close(result[name], mean, rtol=0, atol=tolerance)
    sizes = rounds.strategy.sizes(rounds.adapted)
    numbers = sum(3 * sum(linear_shape(adapter.base)) for adapter in rounds.adapted.adapters.values())
    assert rounds.strategy.payload(sizes, Contact(1, 0, None, {})) == Payload(0, numbers, numbers)
