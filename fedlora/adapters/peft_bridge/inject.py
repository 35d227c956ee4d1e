"""Lets PEFT put its layers into a model, and refuses what it does beside that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fedlora.adapters.peft_bridge.bounds import said, seeded
from fedlora.adapters.peft_bridge.layers import adapter_arrays
from fedlora.errors import InputError

Refuse = Callable[[str], InputError]
"""Makes the error of a type that does not fit, from the reason."""


def inject(
    model: nn.Module, made: PeftConfig, paths: Sequence[str], refuse: Refuse, seed: int
) -> tuple[PeftModel, dict[str, Any]]:
    """Let PEFT put its layers into a model, in place; return its model, and its layers by path."""
    before = [*model.parameters(), *model.buffers()]
    try:
        with seeded(seed):
            peft_model: Any = get_peft_model(model, made)
    except Exception as error:
        raise refuse(f"PEFT cannot put it into these layers ({said(error)})") from None
    layers = {path: model.get_submodule(path) for path in paths}
    alien = [path for path, layer in layers.items() if not isinstance(layer, BaseTunerLayer)]
    if alien:
        raise refuse(f"it leaves {alien[0]} as it was, so that nothing could be trained there")
    if hasattr(peft_model.base_model, "update_and_allocate"):
        raise refuse("it changes its ranks between steps, which no local training asks it to")
    own = {id(array) for layer in layers.values() for _, array in adapter_arrays(layer)}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if outside:
        raise refuse(f"it would train {outside[0]} beside the layers that were chosen")
    known = own | {id(p) for p in before}
    beside = [n for n, a in (*peft_model.named_parameters(), *peft_model.named_buffers()) if id(a) not in known]
    if beside:
        raise refuse(f"it keeps {beside[0]} beside its layers, so that nobody can tell whether clients have the same")
    if any(array._backward_hooks for layer in layers.values() for _, array in adapter_arrays(layer)):
        raise refuse("it changes gradients by hooks, which per-example gradients would go past")
    if not any(p.requires_grad for layer in layers.values() for _, p in adapter_arrays(layer)):
        raise refuse("it trains nothing in these layers")
    return peft_model, layers
