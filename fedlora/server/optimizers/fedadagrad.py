"""FedAdagrad: Adagrad on the server."""

from __future__ import annotations

from flwr.serverapp import strategy as flower

from fedlora.server.optimizers._flower import AdaptiveOptimizer, OnMean


class _OnMean(flower.FedAdagrad, OnMean):
    pass


class FedAdagrad(AdaptiveOptimizer):
    """Adagrad along the clients' mean move (Reddi et al., arXiv 2003.00295)."""

    name = "fedadagrad"
    uses = ("learning_rate", "tau")
    strategy, default_rate = _OnMean, 0.1
