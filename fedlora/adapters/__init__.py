"""What is trained: a linear layer with a client axis, and the parameterisations of an update built from it."""

from fedlora.adapters.layers import AdapterLayer, FactoredLinear
from fedlora.adapters.model import AdaptedModel, adapt
from fedlora.adapters.stacked import RowLayout, StackedLayer, StackedLinear

__all__ = [
    "AdaptedModel",
    "AdapterLayer",
    "FactoredLinear",
    "RowLayout",
    "StackedLayer",
    "StackedLinear",
    "adapt",
]
