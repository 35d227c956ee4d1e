"""What is trained: a linear layer with a client axis, and the parameterisations of an update built from it."""

from fedlora.adapters.model import AdaptedModel, FactoredLinear, adapt
from fedlora.adapters.stacked import RowLayout, StackedLinear

__all__ = [
    "AdaptedModel",
    "FactoredLinear",
    "RowLayout",
    "StackedLinear",
    "adapt",
]
