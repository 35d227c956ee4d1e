"""FedAdagrad: Adagrad on the server."""

from __future__ import annotations

from typing import Any

from flwr.serverapp import strategy as flower

from fedlora.server.optimizers._flower import FlowerOptimizer, OnMean


class _OnMean(flower.FedAdagrad, OnMean):
    pass


class FedAdagrad(FlowerOptimizer):
    """Adagrad along the clients' mean move (Reddi et al., arXiv 2003.00295)."""

    name = "fedadagrad"
    uses = ("learning_rate", "tau")
    moments = ("m_t", "v_t")

    def make(self) -> Any:
        """Take steps of 0.1 by default, as Flower does."""
        rate = 0.1 if self.server.learning_rate is None else self.server.learning_rate
        return _OnMean(eta=rate, tau=self.server.tau)
