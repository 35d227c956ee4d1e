"""What every correction of local training must do, whoever registers it."""

from __future__ import annotations

import copy

import pytest
import torch

from fedlora.arrays import Arrays
from fedlora.config import load_config
from fedlora.corrections import Correction, correction
from fedlora.errors import InputError
from fedlora.registry import CORRECTIONS
from tests.configs import override

NAMES = CORRECTIONS.names()
SHAPES = {"layer.lora_A": (2, 5), "layer.lora_B": (3, 2), "head.bias": (4,), "scale": ()}


def make(name: str) -> Correction:
    return correction(load_config(override("client", {"correction": name, "optimizer": "sgd"})))


def drawn(seed: int) -> Arrays:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def same(first: Arrays, second: Arrays) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        torch.testing.assert_close(array, second[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_an_array_for_each_or_none_at_all(name: str) -> None:
    own, mean, gradient = drawn(1), drawn(2), drawn(3)
    before = copy.deepcopy((own, mean, gradient))
    made = make(name)
    for found in (made.shift(own, mean), made.after(own, mean, gradient)):
        assert {n: tuple(a.shape) for n, a in found.items()} == (SHAPES if made.active else {})
    for given, kept in zip((own, mean, gradient), before, strict=True):
        same(given, kept)


def turned(arrays: Arrays) -> Arrays:
    """Mix the columns of one array with each other."""
    matrix = drawn(9)["layer.lora_A"].T @ drawn(8)["layer.lora_A"]
    return {name: array @ matrix if name == "layer.lora_A" else array for name, array in arrays.items()}


@pytest.mark.parametrize("name", NAMES)
def test_it_turns_with_the_coordinates(name: str) -> None:
    made, own, mean, gradient = make(name), drawn(1), drawn(2), drawn(3)
    same(made.shift(turned(own), turned(mean)), turned(made.shift(own, mean)))
    same(made.after(turned(own), turned(mean), turned(gradient)), turned(made.after(own, mean, gradient)))


def test_other_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"client\.correction = 'feddyn': should be .*'scaffold'"):
        make("feddyn")
