"""LoRA: dW = s B A (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fedlora.adapters.parameterisations import LowRank
from fedlora.arrays import Arrays
from fedlora.models import linear_shape

if TYPE_CHECKING:
    from fedlora.adapters import AdaptedModel


class LoRA(LowRank):
    """Two trained factors."""

    name = "lora"

    def shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, int]]:
        """A [r, n] and B [m, r]."""
        return {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}

    def to_lora(self, factors: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B as they are."""
        return factors["lora_A"], factors["lora_B"]


def initial_factors(
    out_features: int, in_features: int, rank: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """A drawn from a kaiming uniform with a = sqrt 5, B = 0, so that the model starts at the base model.

    Parameters
    ----------
    out_features, in_features, rank : int
    generator : torch.Generator
        Successive calls give every layer a draw of its own.

    Returns
    -------
    dict
        lora_A [r, n] and lora_B [m, r], float32.
    """
    # kaiming_uniform_ with a = sqrt 5 is uniform in +-sqrt(6 / ((1 + 5) n)) = +-1 / sqrt n.
    bound = 1 / math.sqrt(in_features)
    a = (torch.rand(rank, in_features, generator=generator, dtype=torch.float32) * 2 - 1) * bound
    return {"lora_A": a, "lora_B": torch.zeros(out_features, rank)}


def drawn_factors(adapted: AdaptedModel, seed: int, rank: int | None = None) -> Arrays:
    """Draw the usual LoRA start for every layer: A of its own, B = 0.

    Parameters
    ----------
    adapted : AdaptedModel
    seed : int
    rank : int, optional
        That of the model's layers by default.
    """
    generator = torch.Generator().manual_seed(seed)
    arrays: Arrays = {}
    for path, adapter in adapted.adapters.items():
        shape = linear_shape(adapter.base)
        own = rank or adapted.parameter(f"{path}.lora_A").shape[1]
        arrays |= {f"{path}.{factor}": value for factor, value in initial_factors(*shape, own, generator).items()}
    return arrays
