"""FedYogi: Yogi on the server."""

from __future__ import annotations

from flwr.serverapp import strategy as flower

from fedlora.server.optimizers._flower import AdaptiveOptimizer, OnMean


class _OnMean(flower.FedYogi, OnMean):
    pass


class FedYogi(AdaptiveOptimizer):
    """Yogi along the clients' mean move (Reddi et al., arXiv 2003.00295)."""

    name = "fedyogi"
    uses = ("learning_rate", "beta_1", "beta_2", "tau")
    strategy, default_rate = _OnMean, 0.01
