"""The mean, weighed by examples."""

from __future__ import annotations

import torch

from fedlora.server.aggregators import Aggregator


class Mean(Aggregator):
    """Federated averaging (McMahan et al. 2017, arXiv 1602.05629). One client can move it as far as it likes."""

    name = "mean"
    robust = False

    def combine(self, moves: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weigh each client by its examples."""
        return weights @ moves / weights.sum()
