"""FedYogi: Yogi on the server."""

from __future__ import annotations

from typing import Any

from flwr.serverapp import strategy as flower

from fedlora.server.optimizers._flower import FlowerOptimizer, OnMean


class _OnMean(flower.FedYogi, OnMean):
    pass


class FedYogi(FlowerOptimizer):
    """Yogi along the clients' mean move (Reddi et al., arXiv 2003.00295)."""

    name = "fedyogi"
    uses = ("learning_rate", "beta_1", "beta_2", "tau")
    moments = ("m_t", "v_t")

    def make(self) -> Any:
        """Take steps of 0.01 by default, as Flower does."""
        rate = 0.01 if self.server.learning_rate is None else self.server.learning_rate
        return _OnMean(eta=rate, beta_1=self.server.beta_1, beta_2=self.server.beta_2, tau=self.server.tau)
