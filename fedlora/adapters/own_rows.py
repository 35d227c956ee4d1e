"""A layer's output for an input that a batch shares: it looks like one row, and holds every example's own.

DeBERTa's layers project their table of relative positions, one row whatever the batch, with the weights that also meet
the examples. Every example needs a copy of that row, projected by its own client's weights, for its gradient to be its
own. The model's code goes on with a tensor of one row, until it repeats it for the batch or lets it meet the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree


class OwnRows(torch.Tensor):
    """A tensor [1, ...] that the batch's examples share by shape, though each has values of its own.

    Attributes
    ----------
    rows : Tensor [N, 1, ...]
        What the tensor is for each example.
    """

    rows: torch.Tensor

    @staticmethod
    def of(rows: torch.Tensor) -> torch.Tensor:
        """Make one of the examples' values [N, 1, ...]."""
        # A copy: what changes the one in place must not change the other twice.
        shared = rows[0].detach().clone().as_subclass(OwnRows)
        shared.rows = rows
        return shared

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Apply a function to every example's values; where the batch comes in, return an ordinary tensor."""
        leaves, tree = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, OwnRows)]

        def call(*values: torch.Tensor) -> Any:
            filled = list(leaves)
            for place, value in zip(places, values, strict=True):
                filled[place] = value
            positional, named = pytree.tree_unflatten(filled, tree)
            return func(*positional, **named)

        with torch._C.DisableTorchFunctionSubclass():
            rows = [leaves[place].rows for place in places]
            shared = [leaves[place].as_subclass(torch.Tensor) for place in places]
            if _meets_batch(func, args, shared, leaves, len(rows[0])):
                if func is torch.Tensor.repeat:
                    # Blocks of rows, one block an example: each is its own.
                    once = torch.vmap(lambda x: x.repeat(1, *_sizes(args)[1:]))(rows[0])
                    return once.flatten(0, 1)
                return call(*(r.squeeze(1) for r in rows))
            result = call(*shared)
            if not isinstance(result, torch.Tensor) or not result.is_floating_point():
                return result
            return cls.of(torch.vmap(call)(*rows))


def _sizes(args: Sequence[Any]) -> tuple[int, ...]:
    sizes = args[1:]
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], Sequence) else tuple(sizes)


def _meets_batch(
    func: Callable[..., Any], args: Sequence[Any], shared: list[torch.Tensor], leaves: list[Any], examples: int
) -> bool:
    """Say whether a function lets one row meet those of all examples."""
    if func is torch.Tensor.repeat:
        return _sizes(args)[0] == examples and len(_sizes(args)) == shared[0].dim()
    if any(x.dim() == 0 or len(x) != 1 for x in shared):
        return False
    if func is torch.Tensor.expand:
        return _sizes(args)[0] == examples and len(_sizes(args)) == shared[0].dim()
    others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OwnRows)]
    return any(other.dim() == shared[0].dim() and len(other) == examples for other in others)
