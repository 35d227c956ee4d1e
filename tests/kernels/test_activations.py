"""The activations' kernels against PyTorch's own operations in double precision, and which modules take them.

Without a GPU, ``TRITON_INTERPRET=1`` runs the kernels on the CPU where Triton is installed.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from fedlora.adapters import adapt
from fedlora.kernels import activations
from fedlora.training import fuse
from tests import tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.skipif(
    activations.triton is None or (DEVICE == "cpu" and not os.environ.get("TRITON_INTERPRET")),
    reason="the kernels run on a GPU, by Triton",
)
SHAPES = [(3, 700), (2, 5, 1024), (1,)]
REPLACED = {
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
}  # fmt: skip
"""Activations of transformers and what computes them; ``gelu_10`` clips its outputs."""


def half(*shape: int) -> torch.Tensor:
    return (3 * torch.randn(shape, device=DEVICE)).bfloat16().requires_grad_()


def check(found: torch.Tensor, inputs: list[torch.Tensor], stock: Any) -> None:
    """Compare with a function in double precision: what differs is rounding, and the interpreter cuts off."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact, given = stock(*wide), torch.randn_like(found)
    ours = [found, *torch.autograd.grad(found, inputs, given)]
    expected = [exact, *torch.autograd.grad(exact, wide, given.double())]
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=2**-7, atol=1e-5)


@kernels
@pytest.mark.parametrize("name", sorted(activations.ACTIVATIONS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gates_and_their_gradients_are_those_of_pytorch(name: str, shape: tuple[int, ...]) -> None:
    gate, up = half(*shape), half(*shape)
    act = activations.ACTIVATIONS[name]
    check(activations.gated(gate, up, name), [gate, up], lambda g, u: act(g) * u)


@kernels
@pytest.mark.parametrize("name", sorted(activations.ACTIVATIONS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations_and_their_gradients_are_those_of_pytorch(name: str, shape: tuple[int, ...]) -> None:
    x = half(*shape)
    check(activations.activated(x, name), [x], activations.ACTIVATIONS[name])


@kernels
def test_far_from_zero_nothing_overflows() -> None:
    x = torch.tensor([-3e38, -200.0, -30.0, -0.0, 0.0, 30.0, 200.0, 3e38], device=DEVICE).bfloat16().requires_grad_()
    for name in ("silu", "gelu"):
        y = activations.activated(x, name)
        torch.testing.assert_close(y, x.clamp(min=0), atol=1e-5, rtol=0)
        slopes = torch.autograd.grad(y.sum(), x)[0]
        torch.testing.assert_close(slopes, torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1], device=DEVICE).bfloat16())


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_activations_that_are_known_are_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on a GPU in half precision they compute what they did."""
    monkeypatch.setattr(activations, "triton", object())
    model, x = nn.Sequential(nn.Linear(4, 4), ACT2FN[name]), torch.randn(3, 4)
    expected = model(x)
    activations.use_activation_kernels(model)
    assert getattr(model[1], "activation", None) == REPLACED.get(name)
    assert torch.equal(model(x), expected)


def test_what_has_a_kernel_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT's second halves of a block are fused, the first ones, a matrix and an activation, are left alone."""
    monkeypatch.setattr(activations, "triton", object())
    model: Any = tiny.base_model("bert")
    activations.use_activation_kernels(model)
    adapted = adapt(model, tiny.settings("bert"), "lora")
    islands = {type(module).__name__ for module in fuse._islands(adapted.model)}
    assert "BertOutput" in islands
    assert not islands & {"BertIntermediate", "Activation", "LayerNorm", "Linear"}
