"""Gradient checkpointing: activations of a transformer layer are computed again in the backward pass, not kept.

It is PyTorch's own without re-entrance, on the layers that transformers marks for it. A recomputation must see what the
first pass saw: the clients' dropout masks, and the same attention kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedlora import entropy
from fedlora.adapters import AdaptedModel, RowLayout
from fedlora.adapters.model import attention_kernels


def layers_of(adapted: AdaptedModel) -> list[GradientCheckpointingLayer]:
    """Return a model's transformer layers; none for a few old architectures."""
    return [module for module in adapted.model.modules() if isinstance(module, GradientCheckpointingLayer)]


def set_checkpointing(adapted: AdaptedModel, on: bool) -> None:
    """Switch gradient checkpointing on or off; it works while the model is in training mode."""
    contexts = partial(_contexts, adapted.layout)
    run: Any = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    for layer in layers_of(adapted):
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = on, run


def dropout_states(layout: RowLayout) -> list[tuple[torch.Generator, torch.Tensor]]:
    """Return the clients' generators of dropout masks, each with its state."""
    return [(g, g.get_state()) for g in layout.dropout_generators or () if g is not None]


def set_dropout_states(states: list[tuple[torch.Generator, torch.Tensor]]) -> None:
    """Let generators go on from the states."""
    for generator, state in states:
        generator.set_state(state)


def _contexts(layout: RowLayout) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what surrounds a layer's first pass, and what surrounds its recomputation."""
    states = dropout_states(layout)
    secret: list[torch.Tensor] = []  # numbers of the operating system's entropy, which cannot be drawn again

    def record(block: torch.Tensor) -> None:
        entropy.fill_uniform(block)
        secret.append(block.clone())

    @contextmanager
    def first() -> Iterator[None]:
        with _filled_by(layout, record):
            yield

    @contextmanager
    def again() -> Iterator[None]:
        now, numbers = dropout_states(layout), iter(secret)
        set_dropout_states(states)
        try:
            with _filled_by(layout, lambda block: block.copy_(next(numbers))), attention_kernels():
                yield
        finally:
            set_dropout_states(now)

    return first(), again()


@contextmanager
def _filled_by(layout: RowLayout, fill: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    before = layout.fill_secret
    layout.fill_secret = fill
    try:
        yield
    finally:
        layout.fill_secret = before
