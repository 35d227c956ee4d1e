"""The stacked layer: every row meets its own client's weights, and gradients never mix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import nn
from torch.nn import functional

from fedlora.adapters import RowLayout, StackedLinear
from fedlora.adapters.stacked import ClientDropout

shapes = st.fixed_dictionaries(
    {
        "counts": st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
        "tokens": st.lists(st.integers(1, 5), max_size=2),
        "inputs": st.integers(1, 6),
        "outputs": st.integers(1, 6),
        "bias": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


def drawn(shape: dict) -> tuple[StackedLinear, torch.Tensor, torch.Tensor, list[int]]:
    """A trained layer, rows of input, weights for the output, and each row's client."""
    generator = torch.Generator().manual_seed(shape["seed"])

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    counts = shape["counts"]
    layout = RowLayout()
    layout.set_rows(counts)
    layer = StackedLinear(shape["inputs"], shape["outputs"], layout, shape["bias"], torch.float64)
    layer.weight = nn.Parameter(normal(len(counts), shape["outputs"], shape["inputs"]))
    if shape["bias"]:
        layer.bias = nn.Parameter(normal(len(counts), shape["outputs"]))
    rows = sum(counts)
    x = normal(rows, *shape["tokens"], shape["inputs"]).requires_grad_()
    out = normal(rows, *shape["tokens"], shape["outputs"])
    owners = [k for k, count in enumerate(counts) for _ in range(count)]
    return layer, x, out, owners


@given(shapes)
def test_forward_and_gradients_equal_separate_linear_layers(shape):
    layer, x, out, owners = drawn(shape)
    parameters = list(layer.parameters())
    y = layer(x)
    got = torch.autograd.grad((y * out).sum(), [x, *parameters])
    rows = [
        functional.linear(x[n], layer.weight[k], layer.bias[k] if layer.bias is not None else None)
        for n, k in enumerate(owners)
    ]
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(got, torch.autograd.grad((expected * out).sum(), [x, *parameters]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@given(shapes)
def test_per_example_gradients_equal_autograd_row_by_row(shape):
    layer, x, out, owners = drawn(shape)
    hooks = GradSampleHooks(nn.Sequential(layer).train(), loss_reduction="sum")
    layer.layout.per_example = True
    (layer(x) * out).sum().backward()
    samples = {name: p.grad_sample.clone() for name, p in layer.named_parameters()}
    # Opacus' gradients are all that is asked for: the summed ones of the weights are not computed.
    assert layer.weight.grad is None
    hooks.cleanup()
    layer.layout.per_example = False
    for n, k in enumerate(owners):
        layer.layout.set_rows([int(j == k) for j in range(len(shape["counts"]))])
        gradients = torch.autograd.grad((layer(x[n : n + 1]) * out[n : n + 1]).sum(), list(layer.parameters()))
        for (name, _), gradient in zip(layer.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(samples[name][n], gradient[k], rtol=0, atol=1e-12)
            others = [j for j in range(len(gradient)) if j != k]
            assert not gradient[others].any()


@given(shapes)
def test_rows_are_summed_by_client(shape):
    layer, x, _, owners = drawn(shape)
    weights = torch.linspace(-1, 1, len(owners), dtype=torch.float64)
    values = x.detach()
    for w in (None, weights):
        scaled = values if w is None else values * w.reshape(-1, *(1,) * (values.dim() - 1))
        expected = torch.zeros(len(shape["counts"]), *values.shape[1:], dtype=torch.float64)
        for n, k in enumerate(owners):
            expected[k] += scaled[n]
        got = layer.layout.sum_rows(values, w)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@given(shapes)
def test_a_frozen_layer_is_shared(shape):
    layer, x, _, _ = drawn(shape)
    layer.weight = nn.Parameter(layer.weight[:1].detach(), requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[:1].detach(), requires_grad=False)
    bias = layer.bias[0] if layer.bias is not None else None
    torch.testing.assert_close(layer(x), functional.linear(x, layer.weight[0], bias))


def test_alone_it_is_a_linear_layer():
    layout = RowLayout()
    layout.set_rows([6])
    stock = nn.Linear(5, 3)
    layer = StackedLinear(5, 3, layout, bias=True)
    assert (layer.in_features, layer.out_features) == (5, 3)
    layer.weight = nn.Parameter(stock.weight.detach()[None].clone())
    layer.bias = nn.Parameter(stock.bias.detach()[None].clone())
    x = torch.randn(6, 2, 5)
    torch.testing.assert_close(layer(x), stock(x))
    layer(x).square().sum().backward()
    stock(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], stock.weight.grad)
    torch.testing.assert_close(layer.bias.grad[0], stock.bias.grad)


@pytest.mark.parametrize(("weights", "counts"), [(2, [4]), (2, [1, 2, 1]), (1, [2, 2])])
def test_weights_of_other_clients_are_refused(weights, counts):
    """Reshaped into the wrong number of clients, rows would silently meet others' weights."""
    layout = RowLayout()
    layout.set_rows(counts)
    layer = StackedLinear(3, 3, layout)
    layer.weight = nn.Parameter(torch.zeros(weights, 3, 3))
    with pytest.raises(ValueError, match="clients"):
        layer(torch.zeros(4, 3))


def test_half_precision_rows_are_summed_in_single_precision():
    """In bf16 a sum of ones stops at 256."""
    layout = RowLayout()
    layout.set_rows([1000, 3])
    summed = layout.sum_rows(torch.ones(1003, 2, dtype=torch.bfloat16))
    assert summed.dtype == torch.bfloat16
    assert summed.tolist() == [[1000, 1000], [3, 3]]


def test_half_precision_inputs_meet_full_precision_weights():
    layout = RowLayout()
    layout.set_rows([3, 1])
    layer = StackedLinear(4, 2, layout, bias=True)
    layer.weight = nn.Parameter(torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0)))
    layer.bias = nn.Parameter(torch.ones(2, 2))
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(1))
    hooks = GradSampleHooks(nn.Sequential(layer).train(), loss_reduction="sum")
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    samples = layer.weight.grad_sample
    hooks.cleanup()
    assert samples.dtype == torch.float32
    exact = layer(x)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.1)
    layer.weight.grad = None
    exact.square().sum().backward()
    torch.testing.assert_close(layout.sum_rows(samples), layer.weight.grad, rtol=0.05, atol=0.5)


@given(
    counts=st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any),
    tokens=st.integers(0, 5),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_dropout_masks_are_each_clients_own(counts, tokens, padding, seed):
    """Neither others' rows nor padding to others' lengths move a mask; tokens = 0 stands for rows without tokens."""
    layout = RowLayout()
    dropout = ClientDropout(0.4, layout)
    shape = (tokens + padding, 8) if tokens else (8,)
    generators = [torch.Generator().manual_seed(seed + k) for k in range(len(counts))]
    layout.set_rows(counts, [tokens] * len(counts))
    with layout.dropout(generators):
        together = dropout(torch.ones(sum(counts), *shape)).split(counts)
    assert layout.dropout_generators is None
    for k, count in enumerate(counts):
        if count:
            layout.set_rows([count], [tokens])
            alone_shape = (tokens, 8) if tokens else (8,)
            with layout.dropout([torch.Generator().manual_seed(seed + k)]):
                alone = dropout(torch.ones(count, *alone_shape))
            kept = together[k][:, :tokens] if tokens else together[k]
            assert torch.equal(kept, alone)
            assert torch.isin(alone, torch.tensor([0.0, 1 / 0.6])).all()


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    layout = RowLayout()
    dropout = ClientDropout(0.25, layout)
    layout.set_rows([100], [10])
    x = torch.ones(100, 10, 20)
    assert dropout(x) is x
    with layout.dropout([torch.Generator().manual_seed(0)]):
        y = dropout(x)
        assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
        assert float(y.mean()) == pytest.approx(1.0, abs=0.02)
        assert dropout.eval()(x) is x
        assert ClientDropout(0.0, layout)(x) is x
        assert dropout.train()(x.bfloat16()).dtype == torch.bfloat16
