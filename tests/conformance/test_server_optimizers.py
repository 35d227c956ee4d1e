"""What every server optimiser must do, whoever registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config import load_config, unused_keys
from fedlora.errors import InputError
from fedlora.methods import get_method
from fedlora.registry import SERVER_OPTIMIZERS
from fedlora.results.checkpoint import Checkpoint
from fedlora.server.optimizers import Arrays, ServerOptimizer, server_optimizer
from tests.configs import override
from tests.llama_runs import LlamaRuns, adapter, lines
from tests.messages import FakeGrid, train_message

NAMES = SERVER_OPTIMIZERS.names()
SHAPES = {"layer.lora_A": (2, 5), "layer.lora_B": (3, 2), "head.bias": (4,), "scale": ()}


def make(name: str, **server: Any) -> ServerOptimizer:
    return server_optimizer(load_config(override("server", {"optimizer": name, **server})))


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> Arrays:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def equal(first: Arrays, second: Arrays) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_keeps_names_shapes_and_dtypes_and_leaves_what_it_is_given(name: str, dtype: torch.dtype) -> None:
    current, mean = drawn(0, dtype), drawn(1, dtype)
    stepped = make(name).step(current, mean)
    assert list(stepped) == list(mean)
    for key, array in stepped.items():
        assert (array.dtype, array.shape) == (dtype, mean[key].shape)
        assert array.isfinite().all()
        assert not torch.equal(array, current[key])
    assert equal(current, drawn(0, dtype))
    assert equal(mean, drawn(1, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_towards_the_mean_and_stays_where_the_mean_is_the_current(name: str) -> None:
    current, mean = drawn(0), drawn(1)
    stepped = make(name, learning_rate=1e-3).step(current, mean)
    for key in SHAPES:
        assert ((stepped[key] - current[key]) * (mean[key] - current[key]) >= 0).all()
    assert equal(make(name).step(current, current), current)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_the_same_bits(name: str, tmp_path: Path) -> None:
    """Its state goes through the run's checkpoint; arrays come and go."""

    @settings(max_examples=5)
    @given(st.lists(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1), min_size=2, max_size=5), st.data())
    def check(rounds: list[set[str]], data: st.DataObject) -> None:
        stop = data.draw(st.integers(1, len(rounds) - 1))
        whole, parts, current, other = make(name), make(name), drawn(0), drawn(0)
        for number, names in enumerate(rounds):
            if number == stop:
                parts = through_checkpoint(parts)
            mean = {key: array for key, array in drawn(number + 1).items() if key in names}
            current |= whole.step(current, mean)
            other |= parts.step(other, mean)
        assert equal(current, other)

    def through_checkpoint(optimizer: ServerOptimizer) -> ServerOptimizer:
        path = tmp_path / "checkpoint.sqlite"
        path.unlink(missing_ok=True)
        checkpoint, found = Checkpoint(path), {}
        for key, value in optimizer.state_dict().items():
            if value and all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
                checkpoint.set_arrays(key, value)
            else:
                checkpoint[key] = value
            found[key] = checkpoint.get_arrays(key) or checkpoint.get(key)
        checkpoint.close()
        again = make(name)
        again.load_state_dict(found)
        return again

    check()


@pytest.mark.parametrize("name", NAMES)
def test_arrays_of_other_rounds_stay_out_of_a_step(name: str) -> None:
    """A method may train A in one round and B in the next: each goes as it would alone."""
    both, alone, current, other = make(name), make(name), drawn(0), drawn(0)
    first = "layer.lora_A"
    for number in range(4):
        key = first if number % 2 == 0 else "layer.lora_B"
        mean = {key: drawn(number + 1)[key]}
        current |= both.step(current, mean)
        if key == first:
            other |= alone.step(other, mean)
    assert torch.equal(current[first], other[first])


FLOWERS: dict[str, tuple[type[flower.FedAvg], dict[str, float]]] = {
    "fedavgm": (flower.FedAvgM, {"server_learning_rate": 0.7, "server_momentum": 0.5}),
    "fedadam": (flower.FedAdam, {"eta": 0.7, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.01}),
    "fedyogi": (flower.FedYogi, {"eta": 0.7, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.01}),
    "fedadagrad": (flower.FedAdagrad, {"eta": 0.7, "tau": 0.01}),
}
"""Flower's strategies by our names, and settings that are not their defaults."""


@pytest.mark.parametrize("by_default", [False, True])
@pytest.mark.parametrize("name", FLOWERS)
def test_it_does_as_flowers_own_strategy_over_rounds(name: str, by_default: bool) -> None:
    kind, settings = FLOWERS[name]
    if by_default:
        # Flower's own FedAvgM has no momentum unless it is asked for.
        mine, theirs = make(name), kind(**({"server_momentum": 0.9} if name == "fedavgm" else {}))
    else:
        mine, theirs = make(name, learning_rate=0.7, momentum=0.5, beta_1=0.8, beta_2=0.95, tau=0.01), kind(**settings)
    current = drawn(0)
    for number in range(1, 5):
        arrays = ArrayRecord({key: Array(array.numpy()) for key, array in current.items()})
        theirs.configure_train(number, arrays, ConfigRecord(), FakeGrid(lambda message: None))
        mean = drawn(number)
        content = RecordDict(
            {
                "arrays": ArrayRecord({key: Array(array.numpy()) for key, array in mean.items()}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        result, _ = theirs.aggregate_train(number, [Message(content, reply_to=train_message(100 + i)) for i in (0, 1)])
        assert result is not None
        current = mine.step(current, mean)
        for key, array in result.items():
            np.testing.assert_array_equal(current[key].numpy(), array.numpy().astype(np.float32))


@pytest.mark.parametrize("name", [name for name in NAMES if SERVER_OPTIMIZERS.get(name).linear])
def test_a_linear_one_steps_the_same_in_turned_coordinates(name: str) -> None:
    turns = torch.linalg.qr(drawn(9, torch.float64)["layer.lora_A"].T @ drawn(9, torch.float64)["layer.lora_A"])[0]

    def carry(arrays: Arrays) -> Arrays:
        return {key: array @ turns if key == "layer.lora_A" else array for key, array in arrays.items()}

    still, turned = make(name), make(name)
    current = drawn(0, torch.float64)
    for number in range(1, 4):
        mean = drawn(number, torch.float64)
        if number == 3:
            turned.turn(carry)
            expected = carry(still.step(current, mean))
            found = turned.step(carry(current), carry(mean))
            for key, array in expected.items():
                torch.testing.assert_close(found[key], array, rtol=0, atol=1e-12)
            return
        turned.step(current, mean)
        current = still.step(current, mean)


@pytest.mark.parametrize("name", NAMES)
def test_moments_need_coordinates_that_persist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = override("server.optimizer", name)
    monkeypatch.setattr(get_method("fedit"), "persistent", False)
    if not SERVER_OPTIMIZERS.get(name).stateful:
        assert server_optimizer(load_config(content)).state_dict() == {}
        return
    with pytest.raises(InputError, match=rf"server\.optimizer = '{name}'.*fedit .*; use fedavg") as error:
        load_config(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_it_does_not_read_are_noted(name: str) -> None:
    keys = {"learning_rate": 0.5, "momentum": 0.5, "beta_1": 0.5, "beta_2": 0.5, "tau": 0.5}
    notes = unused_keys(load_config(override("server", {"optimizer": name, **keys})))
    noted = {key for key in keys if any(note.startswith(f"server.{key} ") for note in notes)}
    assert noted == set(keys) - set(SERVER_OPTIMIZERS.get(name).uses)
    current, mean = drawn(0), drawn(1)
    plain = make(name)
    plain.step(current, mean)
    for key in keys:
        other = make(name, **{key: 0.5})
        other.step(current, mean)
        # In the second step moments count as well.
        moved = not equal(plain.step(current, drawn(2)), other.step(current, drawn(2)))
        plain = make(name)
        plain.step(current, mean)
        assert moved == (key not in noted), key


def test_fedavg_takes_the_mean() -> None:
    assert equal(make("fedavg").step(drawn(0), drawn(1)), drawn(1))


def test_other_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"server\.optimizer = 'adam': should be .*'fedadam'"):
        load_config(override("server.optimizer", "adam"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", NAMES)
def test_it_steps_in_a_run_which_resumes_to_the_same_bits(name: str, runs: LlamaRuns) -> None:
    sections = {"method": {"name": "fedit", "rank": 2}, "server": {"optimizer": name, "learning_rate": 0.5}}
    whole, resumed = runs.run(**sections), runs.run(**sections, stop=2)
    assert equal(adapter(whole), adapter(resumed))
    assert all(line["counted"] for line in lines(whole))
    plain = runs.run(method={"name": "fedit", "rank": 2})
    assert equal(adapter(whole), adapter(plain)) == (name == "fedavg")


def test_the_first_round_of_a_run_is_a_step_along_the_mean(runs: LlamaRuns) -> None:
    """Half of the step is half way from the start, where B is zero, to the mean."""
    method, once = {"name": "ffa-lora", "rank": 2}, {"rounds": 1, "seed": 3}
    mean = adapter(runs.run(run=once, method=method))
    half = adapter(runs.run(run=once, method=method, server={"optimizer": "fedavgm", "learning_rate": 0.5}))
    for key, array in mean.items():
        scale = 0.5 if "lora_B" in key else 1.0
        torch.testing.assert_close(half[key], scale * array, rtol=1e-6, atol=0)


def test_a_users_own_strategy_is_in_its_place(runs: LlamaRuns) -> None:
    with pytest.raises(InputError, match=r"server\.optimizer = 'fedadam': has no use beside FedAvg"):
        runs.run(server={"optimizer": "fedadam"}, strategy=lambda: flower.FedAvg(fraction_evaluate=0.0))
