"""PEFT's layers with a client axis, and their per-example gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler
from torch import nn
from torch.func import functional_call, grad, vmap

from fedlora.adapters.layers import AdapterLayer
from fedlora.adapters.own_rows import OwnRows
from fedlora.adapters.stacked import RowLayout, StackedLayer
from fedlora.arrays import Arrays

VMAP, ROWS = "vmap", "one row at a time"
"""How per-example gradients are taken: all rows of a client by one vectorised pass, or a pass for each row."""


def adapter_arrays(tuner: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers of PEFT's layer that are not the frozen layer's."""
    for name, tensor in (*tuner.named_parameters(), *tuner.named_buffers()):
        if not name.startswith("base_layer."):
            yield name, tensor


class HeldArray(StackedLayer):
    """One array of an adapter, [K, ...]. Layers that share the array share this object."""

    def __init__(self, value: torch.Tensor, layout: RowLayout) -> None:
        super().__init__(layout)
        self.weight = nn.Parameter(value.detach()[None], False)

    def of(self, client: int) -> torch.Tensor:
        """Return a client's array."""
        return self.weight[client if len(self.weight) > 1 else 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one copy of the array for each of x's rows, which stands for it where its gradients are asked for."""
        copies: torch.Tensor = _Copies.apply(self.weight, len(x))
        return copies


class _Copies(torch.autograd.Function):
    """Stands for a row's own copy of an array: [N, ...], in no memory. Their gradients are the per-example gradients.

    Nobody reads the numbers: :class:`_ByExample` takes them from the array.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rows: int) -> torch.Tensor:
        return weight.new_zeros(()).expand(rows, *weight.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        return None, None  # the grad sampler has them


@register_grad_sampler(HeldArray)
def held_grad_sample(
    layer: HeldArray, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """Per-example gradients for Opacus [N, ...]: those of the rows' copies."""
    return {layer.weight: backprops.to(layer.weight.dtype)}


class PeftLayer(AdapterLayer):
    """A layer of PEFT's, run as a function of its arrays: y = f(x; arrays of the row's client).

    Parameters
    ----------
    base : torch.nn.Linear or transformers Conv1D
        The frozen layer.
    tuner : torch.nn.Module
        PEFT's layer around it.
    held : mapping of str to HeldArray
        By the array's name in the tuner. One that another layer registered already is used and not registered again.
    way : str
        How per-example gradients are taken: VMAP or ROWS.
    layout : RowLayout
    """

    def __init__(
        self, base: nn.Module, tuner: nn.Module, held: Mapping[str, HeldArray], way: str, layout: RowLayout
    ) -> None:
        super().__init__(base, {}, layout)
        self.tuner, self.way, self.held, self.name = tuner, way, dict(held), "a layer of PEFT's"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, ..., n] to [N, ..., m]; see :meth:`AdapterLayer.forward` for an x that the batch shares."""
        rows = self.layout.own_rows(x)
        if rows:
            return OwnRows.of(self.outputs(x.expand(rows, *x.shape[1:])).unsqueeze(1))
        return self.outputs(x)

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return every row's output, by its own client's arrays."""
        self.layout.check_rows(len(x), self.name)
        trained = [name for name, held in self.held.items() if held.weight.requires_grad]
        if self.layout.per_example and trained and torch.is_grad_enabled():
            copies = [self.held[name](x.detach()) for name in trained]
            y: torch.Tensor = _ByExample.apply(self, trained, x, *copies)
            return y
        parts = [self.run(part, self.arrays_of(client)) for client, part in self.by_client(x)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def by_client(self, *tensors: torch.Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield (client, its rows of each tensor) for all clients that have rows."""
        if max(len(held.weight) for held in self.held.values()) == 1:
            yield 0, *tensors
            return
        split = zip(*(tensor.split(list(self.layout.counts)) for tensor in tensors), strict=True)
        yield from ((client, *parts) for client, parts in enumerate(split) if len(parts[0]))

    def arrays_of(self, client: int) -> Arrays:
        """Return a client's arrays by their names in the tuner."""
        return {name: held.of(client) for name, held in self.held.items()}

    def run(self, x: torch.Tensor, arrays: Arrays) -> torch.Tensor:
        """Run PEFT's layer with these arrays."""
        y: torch.Tensor = functional_call(self.tuner, arrays, (x,))
        return y


class _ByExample(torch.autograd.Function):
    """A layer's outputs, whose backward pass gives every row's own copy of the arrays its gradient."""

    @staticmethod
    def forward(ctx: Any, layer: PeftLayer, trained: list[str], x: torch.Tensor, *copies: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.trained = layer, trained
        ctx.save_for_backward(x)
        # Detached: saved arrays would be those of a graph that nobody goes back through.
        parts = [layer.run(part, _detached(layer.arrays_of(client))) for client, part in layer.by_client(x)]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer: PeftLayer = ctx.layer
        sampled = vectorised if layer.way == VMAP else row_by_row
        found = [
            sampled(layer.run, _detached(layer.arrays_of(client)), ctx.trained, rows, g)
            for client, rows, g in layer.by_client(x, gradients[0])
        ]
        samples = [torch.cat([arrays[name] for arrays, _ in found]) for name in ctx.trained]
        return None, None, torch.cat([of_x for _, of_x in found]) if ctx.needs_input_grad[2] else None, *samples


def _detached(arrays: Arrays) -> Arrays:
    return {name: array.detach() for name, array in arrays.items()}


_Run = Callable[[torch.Tensor, Arrays], torch.Tensor]


def vectorised(
    run: _Run, arrays: Arrays, trained: Sequence[str], x: torch.Tensor, g: torch.Tensor
) -> tuple[Arrays, torch.Tensor]:
    """Return each row's gradient of sum(y g), for the trained arrays [N, ...] and for x [N, ...], in one pass."""
    frozen = {name: array for name, array in arrays.items() if name not in trained}

    def product(moving: Arrays, row: torch.Tensor, of_row: torch.Tensor) -> torch.Tensor:
        return (run(row[None], frozen | moving)[0] * of_row).sum()

    found: tuple[Arrays, torch.Tensor] = vmap(grad(product, argnums=(0, 1)), in_dims=(None, 0, 0))(
        {name: arrays[name] for name in trained}, x, g
    )
    return found


def row_by_row(
    run: _Run, arrays: Arrays, trained: Sequence[str], x: torch.Tensor, g: torch.Tensor
) -> tuple[Arrays, torch.Tensor]:
    """Return what :func:`vectorised` does, by a pass for each row."""
    found: list[tuple[torch.Tensor, ...]] = []
    for row, of_row in zip(x.split(1), g.split(1), strict=True):
        leaves = [arrays[name].detach().requires_grad_() for name in trained]
        row = row.detach().requires_grad_()
        with torch.enable_grad():
            y = run(row, arrays | dict(zip(trained, leaves, strict=True)))
            found.append(torch.autograd.grad(y, [*leaves, row], of_row, materialize_grads=True, allow_unused=True))
    *samples, of_x = zip(*found, strict=True)
    return {name: torch.stack(each) for name, each in zip(trained, samples, strict=True)}, torch.cat(of_x)
