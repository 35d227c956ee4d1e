"""What is trained: a linear layer with a client axis, and the parameterisations of an update built from it."""

from fedlora.adapters.expert import ExpertModel, adapt_experts
from fedlora.adapters.model import AdaptedModel, FactoredLinear, adapt
from fedlora.adapters.stacked import RowLayout, StackedLinear

__all__ = [
    "AdaptedModel",
    "ExpertModel",
    "FactoredLinear",
    "RowLayout",
    "StackedLinear",
    "adapt",
    "adapt_experts",
]
