"""The mean, weighed by examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.server.aggregators import Aggregator

if TYPE_CHECKING:
    import torch


class Mean(Aggregator):
    """Federated averaging (McMahan et al. 2017, arXiv 1602.05629). One client can move it as far as it likes."""

    name = "mean"
    robust = False

    def combine(self, moves: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weigh each client by its examples."""
        return weights @ moves / weights.sum()
