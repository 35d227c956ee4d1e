"""Frozen linear layers on a GPU that share an input, such as those of queries, keys and values.

PyTorch computes the gradient that each layer has for the input in a product, and adds them up in further passes over
memory. Here each layer hands the input on to the next one, so that a gradient is added inside the product of the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

HANDED_ON = "_fedlora_handed_on"
"""Attribute of an input: the tensor that its last product handed on, and the input's version at that time."""


def share_inputs(model: nn.Module) -> None:
    """Let a model's frozen linear layers add the gradients of an input that they share inside their products.

    Parameters
    ----------
    model : torch.nn.Module
        Loaded. Its output layer stays as it is: its input has no other use.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if type(module) is nn.Linear and module is not output:
            module.__class__ = FrozenLinear  # its parameters and hooks stay


class FrozenLinear(nn.Linear):
    """A linear layer that hands its input on to the next layer of the same input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., n] to [..., m]."""
        if shares(x, self.weight, self.bias):
            return shared_product(x, self.weight, self.bias)
        return super().forward(x)


def shares(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether gradients for x are added inside its product with a weight: on a GPU, where x alone has a gradient."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and x.is_cuda
        and x.grad_fn is not None  # a leaf may be the input of many passes
        and torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
    )


def shared_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T + b, and hand x on to the next product.

    Parameters
    ----------
    x : Tensor [..., n]
        Its gradient is that of all products.
    weight : Tensor [m, n]
        Frozen.
    bias : Tensor [m], optional

    Returns
    -------
    Tensor [..., m]
        No view, so that something may be added in place.
    """
    y, after = _SharedProduct.apply(handed_on(x), weight, bias)
    setattr(x, HANDED_ON, (after, x._version))
    product: torch.Tensor = y
    return product


def handed_on(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor that takes the place of x in its next product.

    It has the values of x, and its gradient is added to that of the product before. That is done in place, so that only
    products may use it. Before the first product, and after x was changed in place, it is x itself.
    """
    after, version = getattr(x, HANDED_ON, (x, None))
    return after if version == x._version else x


class _SharedProduct(torch.autograd.Function):
    """Return x W^T + b, and x for the next product; backwards, add the product's gradient to that of the others."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        y = x.new_empty(*x.shape[:-1], len(weight))
        flat, rows = y.view(-1, len(weight)), x.reshape(-1, x.shape[-1])
        torch.mm(rows, weight.T, out=flat) if bias is None else torch.addmm(bias, rows, weight.T, out=flat)
        return y, x.detach()  # no view of x, which would keep it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        of_product, of_others = gradients
        if of_product is None:
            return of_others, None, None
        (weight,) = ctx.saved_tensors
        flat = of_product.reshape(-1, len(weight))
        # In place: nobody else has the others' gradient, since only products use what is handed on.
        to_x = flat @ weight if of_others is None else of_others.reshape(-1, weight.shape[1]).addmm_(flat, weight)
        return to_x.view(*of_product.shape[:-1], -1), None, None
