"""RAVAN's client half: scales begin at 1, and leave in the matrices that they scale."""

from __future__ import annotations

import torch

from fedlora.adapters.parameterisations.heads import scaled
from fedlora.arrays import Arrays
from fedlora.clients.half import ClientHalf

_MATRICES, _SCALES = "heads_H", "heads_s"


class ScalingHalf(ClientHalf):
    """Trains a scale for each head, if the model has any, and multiplies it into what leaves."""

    def begin(self, arrays: Arrays) -> Arrays:
        """Add scales of 1 to the matrices that came."""
        there = self.adapted.stacked_layers()
        started = {_scales_of(name): torch.ones(len(array), dtype=array.dtype) for name, array in _matrices(arrays)}
        return arrays | {name: ones for name, ones in started.items() if name in there}

    def finish(self, arrays: Arrays) -> Arrays:
        """Return s_h H_h in the place of H_h and s_h."""
        products = {name: scaled(array, arrays.get(_scales_of(name))) for name, array in _matrices(arrays)}
        return {name: products.get(name, array) for name, array in arrays.items() if not name.endswith(f".{_SCALES}")}


def _matrices(arrays: Arrays) -> list[tuple[str, torch.Tensor]]:
    return [(name, array) for name, array in arrays.items() if name.endswith(f".{_MATRICES}")]


def _scales_of(name: str) -> str:
    return name.removesuffix(_MATRICES) + _SCALES
