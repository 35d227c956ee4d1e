"""The loss of a language model's tokens without the logits of all of them.

Logits [tokens, vocabulary] in float32, their softmax and their gradient are by far the largest tensors of a step: 4 GiB
each for 16 x 512 tokens of a vocabulary of 128,256. Here the frozen output layer is applied to some tokens at a time,
and what remains of each is its loss and the gradient of its hidden state (as in Liger Kernel, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedlora.kernels import cross_entropy

CHUNK = 2**26
"""Logits at once: 256 MiB in float32. Every chunk reads the layer's weight, so that small ones would be slow."""

_LARGE = 3e4
"""A logit at which every softcap in use is saturated."""


@dataclass(frozen=True)
class OutputLayer:
    """A frozen output layer, and what its model does to its outputs.

    Attributes
    ----------
    layer : torch.nn.Linear
    scale : float
        Factor of the logits.
    cap : float, optional
        Of a softcap, cap tanh(logits / cap), as in Gemma 2.
    """

    layer: nn.Linear
    scale: float = 1.0
    cap: float | None = None

    def finish(self, outputs: torch.Tensor) -> torch.Tensor:
        """Turn the layer's outputs [..., vocabulary] into logits, in float32 or float64."""
        logits = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def losses(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of each token [M] in nats, of hidden states [M, d]; 0 where the target is -100."""
        device = self.layer.weight.device
        losses: torch.Tensor = _ChunkedLosses.apply(states.to(device), targets.to(device), self)
        return losses


@dataclass(frozen=True)
class HiddenStates:
    """What a language model's loss is taken from where its logits would be too large.

    Attributes
    ----------
    states : Tensor [N, T, d]
        The output layer's inputs.
    output : OutputLayer
    """

    states: torch.Tensor
    output: OutputLayer


class _ChunkedLosses(torch.autograd.Function):
    """Each token's loss, whose backward pass multiplies each token's gradient, found in the forward pass."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, targets: torch.Tensor, output: OutputLayer) -> torch.Tensor:
        size, wanted = max(1, CHUNK // output.layer.out_features), ctx.needs_input_grad[0]
        losses, gradients = [], []
        for part, target in zip(states.split(size), targets.split(size), strict=True):
            if output.cap is None and cross_entropy.carried(part):
                numbers = functional.linear(part, output.layer.weight, output.layer.bias)
                losses.append(cross_entropy.cross_entropy_(numbers, target, output.scale))
                gradients += [numbers @ output.layer.weight] if wanted else []
                continue
            leaf = part.detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = output.finish(functional.linear(leaf, output.layer.weight, output.layer.bias))
                loss = functional.cross_entropy(logits, target, reduction="none")
                if wanted:
                    gradients += torch.autograd.grad(loss.sum(), leaf)
            losses.append(loss.detach())
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (of_states,) = ctx.saved_tensors
        # Half precision would round the factors: the product alone is rounded.
        return torch.mul(of_states, gradients[0][:, None], out=torch.empty_like(of_states)), None, None


def find_output_layer(model: Any, run: Callable[[], Any]) -> OutputLayer | None:
    """Return a model's output layer; None where its logits are not known to be a function of it.

    The layer's outputs are replaced by numbers of which it shows what the model does to them: nothing, a factor, or a
    softcap. So it is found by what the model does, not by its name.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    run : callable
        Runs the model on some tokens [N, T] and returns its output.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear or layer.weight.requires_grad:
        return None
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def stand_in(_: nn.Module, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(outputs.dtype, torch.float32)
        numbers = torch.linspace(-50, 50, outputs.numel(), dtype=wide, device=outputs.device)
        numbers[0] = _LARGE
        calls.append((inputs[0], numbers.reshape(outputs.shape)))
        return calls[-1][1].clone()

    hook = layer.register_forward_hook(stand_in)
    try:
        found: torch.Tensor = run().logits
    finally:
        hook.remove()
    if len(calls) != 1 or calls[0][0].dim() != 3 or found.shape != calls[0][1].shape:
        return None
    given, first = calls[0][1], float(found.flatten()[0])
    for output in (OutputLayer(layer, scale=first / _LARGE), OutputLayer(layer, cap=first)):
        if torch.allclose(output.finish(given), found.to(given), rtol=1e-5, atol=1e-5):
            return output
    return None
