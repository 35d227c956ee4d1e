"""The median of every number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.server.aggregators import Aggregator

if TYPE_CHECKING:
    import torch


class Median(Aggregator):
    """Coordinate-wise median (Yin et al. 2018, arXiv 1803.01498): holds while fewer than half of the clients are wrong.

    All clients count alike.
    """

    name = "median"

    def combine(self, moves: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Take the middle, or the mean of the two in the middle."""
        ordered, half = moves.sort(dim=0).values, (len(moves) - 1) // 2
        return (ordered[half] + ordered[len(moves) // 2]) / 2
