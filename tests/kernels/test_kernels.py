"""The kernels against PyTorch's own operations, and their callers where no kernel runs.

Without a GPU, ``TRITON_INTERPRET=1`` runs the kernels on the CPU where Triton is installed.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedlora.adapters.layers import FactoredLinear
from fedlora.adapters.stacked import RowLayout
from fedlora.kernels import attention, cross_entropy
from fedlora.kernels.products import handed_on, share_inputs
from tests import tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
"""Triton's interpreter multiplies no matrices of bfloat16."""

kernels = pytest.mark.skipif(
    attention.triton is None or (DEVICE == "cpu" and not os.environ.get("TRITON_INTERPRET")),
    reason="the kernels run on a GPU, by Triton",
)
SHAPES = [(3, 20, 2, 32), (5, 64, 4, 32), (2, 128, 3, 64), (2, 7, 1, 8), (3, 100, 2, 128)]
"""Rows, tokens, heads and a head's width."""


def drawn(shape: tuple[int, int, int, int], masked: bool) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return query, key and value [N, T, heads, width], and a mask of rows of unlike lengths."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=DEVICE, dtype=HALF, requires_grad=True) for _ in range(3)]
    rows, tokens = shape[:2]
    lengths = torch.randint(1, tokens + 1, (rows, 1), device=DEVICE)
    seen = (torch.arange(tokens, device=DEVICE) < lengths)[:, None, None, :]
    return tensors, seen if masked else None


@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("masked", "causal"), [(False, False), (True, False), (False, True)])
def test_attention_and_its_gradients_are_those_of_pytorch(
    shape: tuple[int, int, int, int], masked: bool, causal: bool
) -> None:
    tensors, mask = drawn(shape, masked)
    gradient = torch.randn(shape, device=DEVICE, dtype=HALF)
    parts = [x.transpose(1, 2) for x in tensors]
    ours = attention.short_attention(*parts, mask, shape[-1] ** -0.5, causal)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in wide), attn_mask=mask, is_causal=causal
    ).transpose(1, 2)
    expected = [exact, *torch.autograd.grad(exact, wide, gradient.double())]
    found = [ours, *torch.autograd.grad(ours, tensors, gradient)]
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()
    if mask is not None:
        whole = mask.expand(-1, -1, shape[1], -1).contiguous()
        assert torch.equal(
            attention.short_attention(*(x.transpose(1, 2) for x in tensors), whole, shape[-1] ** -0.5), ours
        )
    # Nothing is added in memory in an order that changes.
    again = attention.short_attention(*parts, mask, shape[-1] ** -0.5, causal)
    assert torch.equal(again, ours)
    for one, other in zip(torch.autograd.grad(again, tensors, gradient), found[1:], strict=True):
        assert torch.equal(one, other)


@kernels
def test_a_query_that_sees_no_key_gets_zeros_and_no_gradient() -> None:
    tensors, _ = drawn((2, 20, 2, 32), False)
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool, device=DEVICE)
    mask[1, 0, 7] = False
    parts = [x.transpose(1, 2) for x in tensors]
    output = attention.short_attention(*parts, mask, 32**-0.5)
    assert not output[1, 7].any()
    assert output[1, 6].all()
    gradients = torch.autograd.grad(output.float().sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][1, 7].any()


@kernels
@pytest.mark.parametrize("vocabulary", [37, 9000, 128_256])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_cross_entropy_and_its_gradient_are_those_of_pytorch(vocabulary: int, scale: float) -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(5, vocabulary, device=DEVICE)).bfloat16()
    targets = torch.tensor([0, 3, -100, vocabulary - 1, 7], device=DEVICE)
    leaf = logits.double().requires_grad_()
    expected = functional.cross_entropy(leaf * scale, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    losses = cross_entropy.cross_entropy_(logits, targets, scale)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert (logits.double() - gradient).norm() < 0.01 * gradient.norm()
    assert not logits[2].any()


@kernels
@pytest.mark.skipif(DEVICE == "cpu", reason="a model's inputs have to be on a GPU")
@pytest.mark.parametrize("kind", ["bert", "mean"])
def test_a_model_attends_by_the_kernel_as_without(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = tiny.adapted_model(kind, tiny.settings(kind))
    model: Any = adapted.model.to("cuda", torch.bfloat16)
    ids = torch.randint(5, 20, (3, 12), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    adapted.layout.set_rows([3])
    without = model(input_ids=ids, attention_mask=mask)[0].float()
    exact = model.float()(input_ids=ids, attention_mask=mask)[0]
    model.bfloat16()
    assert attention.use_short_attention(model)
    calls: list[Any] = []
    kernel = attention.short_attention
    monkeypatch.setattr(attention, "short_attention", lambda *given: calls.append(given) or kernel(*given))
    inside = model(input_ids=ids, attention_mask=mask)[0].float()
    assert len(calls) == getattr(model, "encoder", model).config.num_hidden_layers
    # Both round to bfloat16, in other places.
    assert (inside - exact).norm() < 2 * (without - exact).norm() + 1e-3 * exact.norm()


def test_what_no_kernel_carries_is_left_to_pytorch() -> None:
    query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))
    layer = nn.Module()
    layer.is_causal = False  # type: ignore[assignment]
    assert not attention.carried(query, key, value, None)
    found, _ = attention.short_attention_forward(layer, query, key, value, None)
    expected = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    assert not cross_entropy.carried(torch.zeros(2, 3))


TRAINED = [
    *((("a", "b"), chosen) for chosen in ("a", "b", "ab")),
    *((("a", "r", "b"), chosen) for chosen in ("a", "r", "b", "arb")),
]
"""A layer's factors, and those of them that are trained."""


@pytest.mark.parametrize(("names", "chosen"), TRAINED, ids=str)
@pytest.mark.parametrize("counts", [[4], [2, 3], [2, 2]], ids=str)
def test_sums_inside_products_are_the_sums(
    names: tuple[str, ...], chosen: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a layer does on a GPU, done on the CPU, against what it does there."""
    torch.manual_seed(0)
    layout = RowLayout()
    layout.set_rows(counts)
    shapes = {"a": (3, 8), "r": (3, 3), "b": (6, 3)}
    layer = FactoredLinear(nn.Linear(8, 6).requires_grad_(False), {n: shapes[n] for n in names}, 0.7, layout)
    for name in names:
        value = torch.randn(len(counts) if name in chosen else 1, *shapes[name])
        getattr(layer, name).weight = nn.Parameter(value, requires_grad=name in chosen)
    share_inputs(layer)
    leaf = torch.randn(sum(counts), 5, 8, requires_grad=True)
    x = 1.0 * leaf
    wanted = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
    gradient = torch.randn(sum(counts), 5, 6)
    expected = layer(x)
    gradients = torch.autograd.grad(expected, wanted, gradient, retain_graph=True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, wanted, gradient), gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert handed_on(x) is not x
