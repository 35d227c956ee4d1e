"""FedAvg: the mean itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedlora.arrays import Arrays
from fedlora.server.optimizers import ServerOptimizer


class FedAvg(ServerOptimizer):
    """Goes all the way to the mean (McMahan et al., arXiv 1602.05629)."""

    name = "fedavg"
    stateful = False

    def step(self, current: Mapping[str, torch.Tensor], mean: Mapping[str, torch.Tensor]) -> Arrays:
        """Return the mean."""
        return dict(mean)
