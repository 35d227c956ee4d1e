"""What is trained: a linear layer with a client axis, and the parameterisations of an update built from it."""

from __future__ import annotations

from torch import nn

from fedlora.adapters.expert import KIND, ExpertModel, adapt_experts
from fedlora.adapters.model import AdaptedModel, FactoredLinear, adapt_linear
from fedlora.adapters.stacked import RowLayout, StackedLinear
from fedlora.config import Config

__all__ = ["AdaptedModel", "ExpertModel", "FactoredLinear", "RowLayout", "StackedLinear", "adapt"]


def adapt(model: nn.Module, config: Config, kind: str) -> AdaptedModel:
    """Put what is trained into a frozen base model, in place, by the name of a method's parameterisation."""
    return adapt_experts(model, config) if kind == KIND else adapt_linear(model, config, kind)
