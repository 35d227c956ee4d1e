"""Frozen layers that share an input, against PyTorch's: the same sums, taken inside the products."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedlora.kernels import products
from tests.architectures import DECODERS, ENCODERS, build

MODELS = [
    "llama", "gemma2", "phi3", "olmo2", "gptj", "gpt_neox", "bloom", "mixtral", "recurrent_gemma",
    "bert", "albert", "deberta-v3", "convbert", "longformer", "bart", "xlnet",
]  # fmt: skip
"""Of many forms: attention beside the feed-forward block, shared layers, experts, convolutions, two stacks."""


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on a GPU is done on the CPU."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


class Block(nn.Module):
    """Several layers of one input, of which some have a bias, and a sum with the input."""

    def __init__(self, layers: int, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=bool(i % 2)) for i in range(layers))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        chosen = range(len(self.layers)) if order is None else order
        return x + sum(torch.tanh((i + 1) * self.layers[i](x)) for i in chosen)


def gradient(block: Callable[..., torch.Tensor], leaf: torch.Tensor, *given: object) -> torch.Tensor:
    """Return the gradient of a weighted sum with respect to a leaf, whose double the block gets."""
    leaf.grad = None
    y = block(2 * leaf, *given)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    assert leaf.grad is not None
    return leaf.grad


def pair(layers: int) -> tuple[Block, Block]:
    """Return a block of PyTorch's layers, and one of the same weights that shares inputs."""
    torch.manual_seed(layers)
    plain, shared = Block(layers).double(), Block(layers).double()
    shared.load_state_dict(plain.state_dict())
    products.share_inputs(shared)
    return plain, shared


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 3))
def test_gradients_are_those_of_pytorch(order: list[int], rows: int) -> None:
    """Layers in any order, some of them more than once."""
    plain, shared = pair(4)
    leaf = torch.randn(rows, 5, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(shared(2 * leaf, order), plain(2 * leaf, order))
    torch.testing.assert_close(gradient(shared, leaf, order), gradient(plain, leaf, order))


def test_gradients_of_all_layers_come_through_one_chain() -> None:
    _, shared = pair(3)
    x = 2 * torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    ways = [layer(x) for layer in shared.layers]
    chain, node = 0, ways[-1].grad_fn
    while type(node).__name__ == "_SharedProductBackward":
        chain, node = chain + 1, node.next_functions[0][0]
    assert (chain, node) == (3, x.grad_fn)


def test_what_changes_in_place_is_another_input() -> None:
    plain, shared = pair(2)

    def change(block: Block, x: torch.Tensor) -> torch.Tensor:
        first = block.layers[0](x)
        x.mul_(3)
        return first + block.layers[1](x)

    leaf = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    found, expected = (gradient(lambda x, b=block: change(b, x), leaf) for block in (shared, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    plain, shared = pair(3)
    leaf = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    found = gradient(lambda x: checkpoint(shared, x, use_reentrant=reentrant), leaf)
    torch.testing.assert_close(found, gradient(plain, leaf))


def test_each_output_may_be_led_back_by_itself() -> None:
    _, shared = pair(3)
    leaf = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for order in itertools.permutations(range(3)):
        x = 2 * leaf
        outputs = [layer(x) for layer in shared.layers]
        for i in order:
            (found,) = torch.autograd.grad(outputs[i].sum(), x, retain_graph=True)
            torch.testing.assert_close(found, shared.layers[i].weight.sum(0).expand_as(x))


def test_an_input_of_many_passes_is_not_handed_on() -> None:
    _, shared = pair(2)
    leaf = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        shared(leaf).sum().backward()
    assert products.handed_on(leaf) is leaf


def test_nothing_keeps_an_input_alive() -> None:
    """Its memory is free as soon as its last user is."""
    import gc
    import weakref

    _, shared = pair(2)
    leaf = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    gc.disable()
    try:
        x = 2 * leaf
        y = shared.layers[0](x).sum() + shared.layers[1](x).sum()
        gone = weakref.ref(x)
        del x
        assert gone() is None
        y.backward()
    finally:
        gc.enable()
    assert leaf.grad is not None


def test_trained_layers_and_the_output_layer_stay_as_they_are() -> None:
    _, shared = pair(2)
    shared.layers[0].weight.requires_grad_(True)
    x = 2 * torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(shared.layers[0](x), functional.linear(x, shared.layers[0].weight))
    assert products.handed_on(x) is x

    class Model(Block):
        def get_output_embeddings(self) -> nn.Module:
            return self.layers[1]

    model = Model(2)
    products.share_inputs(model)
    assert [type(layer) for layer in model.layers] == [products.FrozenLinear, nn.Linear]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_s_gradients_are_as_without(name: str) -> None:
    """Those of its embeddings, to which the gradients of all its layers lead; with and without checkpointing."""
    model: Any = build(*(DECODERS | ENCODERS)[name], "causal-lm" if name in DECODERS else "default").train()
    trained = model.get_input_embeddings().weight.requires_grad_(True)
    ids = torch.tensor([[*range(4, 12), 2], [*range(12, 20), 2]])

    def found() -> torch.Tensor:
        logits = model(input_ids=ids)[0]
        weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        return torch.autograd.grad((logits * weights).sum(), trained)[0]

    expected = found()
    products.share_inputs(model)
    assert (found() - expected).norm() < 1e-4 * expected.norm()
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert (found() - expected).norm() < 1e-4 * expected.norm()
