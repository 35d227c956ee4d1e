"""A language model's loss in chunks of tokens: the same numbers, and logits that are never whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora import output_layer
from fedlora.adapters import AdaptedModel, adapt
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.output_layer import HiddenStates, OutputLayer
from fedlora.tasks import get_task
from fedlora.training import evaluate, train_cohort
from tests import tiny
from tests.architectures import DECODERS, build

PLAIN = output_layer.CHUNK
CHUNK = 7 * 60
"""Seven tokens of these models' vocabulary, or eight of the tiny Llama's: no batch is a multiple of it."""

OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 7.0},
    "cohere": {"logit_scale": 0.3},
    "phi": {},
    "gpt_neox": {},
}
"""Plain, a softcap, a divisor, a factor, a bias, and an output layer of another name."""


def made(name: str, dtype: torch.dtype = torch.float32, **sections: Any) -> tuple[AdaptedModel, Config]:
    """Make a model with adapters in it, none of them zero."""
    kind, options = DECODERS[name]
    config = tiny.settings("llama", **{"method": {"target_modules": "all-linear"}, **sections})
    model: Any = build(kind, options | OPTIONS.get(name, {}), "causal-lm").to(dtype)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        model.get_output_embeddings().bias.data.normal_(0, 1, generator=torch.Generator().manual_seed(3))
    adapted = adapt(model, config, "lora")
    tiny.start(adapted)
    return adapted, config


def gradients(adapted: AdaptedModel, rows: int) -> tuple[torch.Tensor, Arrays]:
    """Losses of a batch of two clients' rows, and the gradients of their weighted sum."""
    names = tuple(n for n in adapted.stacked_layers())
    adapted.set_clients([adapted.arrays(names)] * 2)
    adapted.model.train()
    batch = tiny.table("llama", rows).batch(np.arange(rows))
    adapted.layout.set_rows([1, rows - 1])
    task = get_task("causal-lm")
    found = adapted.outputs(batch, task)
    assert isinstance(found, HiddenStates) == (output_layer.CHUNK != PLAIN)
    losses = task.loss(found, batch["labels"])
    (losses * torch.linspace(0.5, 1.5, rows) / rows).sum().backward()
    return losses.detach(), {name: adapted.parameter(name).grad for name in names}  # type: ignore[misc]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_gradients_are_those_of_the_logits(
    name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, _ = made(name, dtype)
    losses, expected = gradients(adapted, 5)
    monkeypatch.setattr(output_layer, "CHUNK", CHUNK)
    found, got = gradients(adapted, 5)
    torch.testing.assert_close(found, losses, rtol=tolerance, atol=0)
    assert all(gradient.norm() > 1e-4 for gradient in expected.values())
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=0, atol=tolerance * max(1.0, largest))
    output = adapted._output
    assert output is not None
    assert (output.cap is not None, output.scale != 1) == (name == "gemma2", name in ("granite", "cohere"))


def change(model: Any, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let a model change its logits before it returns them."""

    def changed(_: nn.Module, __: Any, output: Any) -> Any:
        output.logits = of(output.logits)
        return output

    model.register_forward_hook(changed)


@pytest.mark.parametrize(
    "of",
    [
        lambda logits: logits + torch.arange(logits.shape[1])[:, None],  # by position
        lambda logits: torch.where(torch.arange(logits.shape[2]) < 4, -30.0, logits),  # tokens that are ruled out
        lambda logits: 3 * torch.tanh(logits),
        lambda logits: logits.clamp(max=20),
        lambda logits: logits[..., :-1],
    ],
)
def test_a_model_that_does_something_else_to_its_logits_keeps_them(
    of: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, _ = made("llama")
    change(adapted.model, of)
    monkeypatch.setattr(output_layer, "CHUNK", CHUNK)
    batch = tiny.table("llama", 5).batch(np.arange(5))
    adapted.layout.set_rows([5])
    with torch.no_grad():
        found = adapted.outputs(batch, get_task("causal-lm"))
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, adapted.logits(batch))


def test_an_adapted_output_layer_has_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_layer, "CHUNK", CHUNK)
    adapted, _ = made("llama", method={"target_modules": ["lm_head", "q_proj"]})
    batch = tiny.table("llama", 5).batch(np.arange(5))
    adapted.layout.set_rows([5])
    assert isinstance(adapted.outputs(batch, get_task("causal-lm")), torch.Tensor)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_training_and_evaluation_are_those_of_the_logits(
    name: str, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cohort of three, and its clients alone."""
    client = {"optimizer": "sgd", "local_steps": 2, "batch_size": 3}
    adapted, config = made(name, client=client)
    start = adapted.arrays(adapted.stacked_layers())
    sizes = [4, 1, 6]
    examples = tiny.table("llama", sum(sizes))
    plans = [tiny.plan(0.5, 0.1, 0.7, 2.0)] * 3 if private else None
    jobs = tiny.jobs_of([start] * 3, tiny.split(sizes), plans, learning_rate=0.02)

    def evaluated() -> dict[str, Any]:
        adapted.set_clients([start])
        return evaluate(adapted, examples, 5)

    expected, score = train_cohort(adapted, examples, jobs, config), evaluated()
    monkeypatch.setattr(output_layer, "CHUNK", CHUNK)
    together = train_cohort(adapted, examples, jobs, config)
    assert evaluated() == pytest.approx(score, rel=1e-6)
    alone = [train_cohort(adapted, examples, [job], config)[0] for job in jobs]
    for results in (together, alone):
        for result, other in zip(results, expected, strict=True):
            assert tiny.difference(result.arrays, other.arrays) < 1e-6
            assert result.loss == tiny.same_loss(other.loss)
    assert all(tiny.difference(result.arrays, start) > 1e-3 for result in expected)


class Largest(TorchDispatchMode):
    """Notes of how many tokens a tensor holds logits at most; views of the output layer's weight hold none."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.vocabulary, self.weight, self.rows = len(weight), weight.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if not isinstance(tensor, torch.Tensor) or tensor.data_ptr() == self.weight:
                continue
            if tensor.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("private", [False, True])
def test_logits_are_never_whole(private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.settings("llama", client={"local_steps": 1, "batch_size": 12})
    adapted = tiny.adapted_model("llama", config)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    examples = tiny.table("llama", 12)
    plans = [tiny.plan(0.5, 0.1, 1.0, 12.0)] if private else None
    (job,) = tiny.jobs_of([start], [np.arange(12)], plans)
    if private:
        train_cohort(adapted, examples, [job], config)  # measures that examples are independent, with few tokens

    def most() -> int:
        with Largest(adapted.model.get_output_embeddings().weight) as watched:  # type: ignore[operator]
            train_cohort(adapted, examples, [job], config)
            evaluate(adapted, examples, 12)
        return watched.rows

    tokens = 12 * int(examples.lengths.max())
    assert most() == tokens > 90
    monkeypatch.setattr(output_layer, "CHUNK", 9 * tiny.VOCABULARY)
    assert adapted._output is not None
    assert most() == 9


def test_half_precision_is_left_for_the_loss_alone() -> None:
    """Logits are compared in float32; gradients of hidden states have the states' dtype."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 50, bias=False).requires_grad_(False)
    states = torch.randn(9, 16, generator=generator).bfloat16().requires_grad_()
    targets = torch.tensor([3, -100, 7, 49, 0, 1, -100, 2, 30])
    output = OutputLayer(layer.to(torch.bfloat16))
    losses = output.losses(states, targets)
    assert losses.dtype == torch.float32
    assert losses[targets == -100].tolist() == [0, 0]
    losses.sum().backward()
    wide = states.detach().float().requires_grad_()
    expected = OutputLayer(layer.float()).losses(wide, targets)
    expected.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.02)
    assert states.grad is not None
    assert states.grad.dtype == torch.bfloat16
    torch.testing.assert_close(states.grad.float(), wide.grad, rtol=0.02, atol=0.02)
    assert OutputLayer(layer).losses(wide[:0], targets[:0]).shape == (0,)
