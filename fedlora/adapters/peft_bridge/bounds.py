"""Runs PEFT's code quietly, from a seed, and within bounds."""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

MADE, RUN = 64, 1024
"""Most numbers that making a layer, or running it once, may write for each number of its weight."""
_LEAST, _OPERATIONS = 2**22, 2**17
"""For each layer: numbers that are always allowed, and most operations of PyTorch's."""


def said(error: Exception) -> str:
    """Return an error's kind and words in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings, and what is written to stderr: some types show a progress bar."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let all that draws at random draw from a seed, and put back the generators afterwards."""
    chance = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(chance[0])
            np.random.set_state(chance[1])


class Bounded(TorchDispatchMode):
    """Ends code that would write too many numbers or take too many operations, before it takes the memory for them.

    A server's config must not fill a node's memory, or keep it busy. What is counted depends on the config and the
    model alone, so the server and all nodes refuse the same.

    Parameters
    ----------
    layers : sequence of torch.nn.Module
        What the code works on.
    share : int
        MADE or RUN.

    Raises
    ------
    RuntimeError
        From the operation that exceeds the bounds, and from all that follow.
    """

    def __init__(self, layers: Sequence[nn.Module], share: int) -> None:
        super().__init__()
        weights = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        self._numbers, self._operations = _LEAST * len(layers) + share * weights, _OPERATIONS * len(layers)
        self.made = self.taken = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count an operation, and what it would make, before it runs."""
        kwargs = dict(kwargs or {})
        self.taken += 1
        if self.taken > self._operations:
            raise RuntimeError(f"would take more than {self._operations:,} operations")
        self.made += _new_numbers(func, args, kwargs)
        if self.made > self._numbers:
            raise RuntimeError(f"would make more than {self._numbers:,} numbers")
        return func(*args, **kwargs)


def _new_numbers(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Return how many numbers an operation makes, from shapes alone; 0 for a view, and where shapes do not tell."""
    if any(value.alias_info is not None for value in func._schema.returns):
        return 0
    on_meta = kwargs | {name: value for name, value in _ON_META.items() if name in kwargs}
    try:
        args, on_meta = pytree.tree_map_only(torch.Tensor, _shape, (args, on_meta))
        shapes = func(*args, **on_meta)
    except Exception:
        return 0
    return sum(leaf.numel() for leaf in pytree.tree_leaves(shapes) if isinstance(leaf, torch.Tensor))


_ON_META = {"device": torch.device("meta"), "generator": None, "pin_memory": None}


def _shape(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
