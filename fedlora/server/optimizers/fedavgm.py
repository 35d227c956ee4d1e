"""FedAvgM: a server with momentum."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import strategy as flower

from fedlora.server.optimizers._flower import FlowerOptimizer, OnMean


class _OnMean(flower.FedAvgM, OnMean):
    pass


class FedAvgM(FlowerOptimizer):
    """SGD with momentum along the clients' mean move (Hsu, Qi, Brown, arXiv 1909.06335)."""

    name = "fedavgm"
    uses = ("learning_rate", "momentum")
    moments = ("momentum_vector",)
    linear = True

    def make(self) -> Any:
        """Take steps of 1 by default."""
        rate = 1.0 if self.server.learning_rate is None else self.server.learning_rate
        return _OnMean(server_learning_rate=rate, server_momentum=self.server.momentum)

    def restore(self, strategy: Any, names: list[str], current: dict[str, np.ndarray]) -> None:
        """Flower keeps this one's arrays as a record, and its moments as a list."""
        super().restore(strategy, names, current)
        strategy.current_arrays = ArrayRecord({name: Array(array) for name, array in current.items()})
        if strategy.momentum_vector is not None:
            strategy.momentum_vector = list(strategy.momentum_vector.values())
