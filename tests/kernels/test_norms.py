"""The norms' kernels against PyTorch's own operations in double precision, and which modules take them.

Without a GPU, ``TRITON_INTERPRET=1`` runs the kernels on the CPU where Triton is installed.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedlora.kernels import norms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.skipif(
    norms.triton is None or (DEVICE == "cpu" and not os.environ.get("TRITON_INTERPRET")),
    reason="the kernels run on a GPU, by Triton",
)


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).bfloat16()


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, centred: bool) -> torch.Tensor:
    if centred:
        return functional.layer_norm(x, (len(weight),), weight, bias, eps)
    return functional.rms_norm(x, (len(weight),), weight, eps)


@kernels
@pytest.mark.parametrize("shape", [(3, 384), (2, 5, 1024), (1, 1), (4, 1025), (2, 16384)], ids=str)
@pytest.mark.parametrize(("centred", "biased"), [(True, True), (True, False), (False, False)])
def test_norms_and_their_gradients_are_those_of_pytorch(shape: tuple[int, ...], centred: bool, biased: bool) -> None:
    """Far from zero too: there a sum of squares would lose what a mean of moves from the mean keeps."""
    torch.manual_seed(0)
    for far in (0.0, 50.0):
        x = (half(*shape) + far).requires_grad_()
        weight, bias = half(shape[-1]), half(shape[-1]) if biased else None
        found, given = norms.normed(x, weight, bias, 1e-5, centred=centred), half(*shape)
        wide = x.detach().double().requires_grad_()
        expected = exact(wide, weight.double(), None if bias is None else bias.double(), 1e-5, centred)
        torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-5)
        (ours,) = torch.autograd.grad(found, x, given)
        (theirs,) = torch.autograd.grad(expected, wide, given.double())
        assert (ours.double() - theirs).norm() <= 0.01 * theirs.norm() + 1e-3


@kernels
def test_constant_rows_neither_divide_by_zero_nor_grow() -> None:
    x = torch.zeros(2, 8, device=DEVICE).bfloat16().requires_grad_()
    weight = torch.ones(8, device=DEVICE).bfloat16()
    for centred in (True, False):
        y = norms.normed(x, weight, None, 1e-5, centred=centred)
        assert not y.any()
        assert torch.autograd.grad(y.float().sum(), x)[0].isfinite().all()


def test_only_plain_frozen_norms_are_taken() -> None:
    """Norms of several axes, or without a weight, stay; trained ones keep a gradient."""

    class Own(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model: Any = nn.ModuleDict(
        {
            "plain": nn.LayerNorm(4, eps=1e-3, bias=False),
            "bare": nn.LayerNorm(4, elementwise_affine=False),
            "square": nn.LayerNorm((4, 4)),
            "own": Own(4),
            "rms": nn.RMSNorm(4, eps=1e-3),
        }
    )
    x = torch.randn(3, 4, 4)
    expected = {name: norm(x) for name, norm in model.items()}
    names = {name for name, _ in model.named_parameters()}
    norms.use_norm_kernels(model.eval())
    assert {name for name, norm in model.items() if type(norm).__module__ == norms.__name__} == {"plain", "rms"}
    assert names == {name for name, _ in model.named_parameters()}
    for name, norm in model.items():
        assert torch.equal(norm(x), expected[name])
        assert not norm.training
    model["plain"](x).square().sum().backward()
    assert model["plain"].weight.grad.any()


@pytest.mark.parametrize("kind", [norms.LayerNorm, norms.RMSNorm])
def test_frozen_norms_in_half_precision_on_a_gpu_take_the_kernels(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in float32, in another precision than their input, or trained, do not."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(norms, "triton", object())
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(norms, "normed", lambda x, *_, **__: taken.append(x) or x)
    norm, x = kind(8, eps=1e-3).bfloat16().requires_grad_(False), torch.randn(2, 8)
    norm(x.bfloat16())
    assert len(taken) == 1
    norm.float()(x)
    norm.requires_grad_(True).bfloat16()(x.bfloat16())
    assert len(taken) == 1
