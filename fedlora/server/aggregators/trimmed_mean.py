"""The mean of every number without the largest and the smallest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.server.aggregators import Aggregator

if TYPE_CHECKING:
    import torch


class TrimmedMean(Aggregator):
    """Coordinate-wise trimmed mean (Yin et al. 2018, arXiv 1803.01498): holds while a share trimmed_share is wrong.

    All clients count alike.
    """

    name = "trimmed-mean"
    uses = ("trimmed_share",)

    def combine(self, moves: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Leave ``trimmed_share`` of the values out at each end, rounded up."""
        # Without the last digits, so that 0.1 of 10 clients is 1.
        cut = -int(-(round(self.server.trimmed_share * len(moves), 9)) // 1)
        cut = min(cut, (len(moves) - 1) // 2)
        return moves.sort(dim=0).values[cut : len(moves) - cut].mean(dim=0)
