"""Fed-SB: averaging of small square matrices."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from fedlora.adapters import AdaptedModel, sb
from fedlora.adapters.model import dense_weight
from fedlora.communication.wire import Arrays
from fedlora.data.tokens import FederatedData, TokenTable
from fedlora.errors import InputError
from fedlora.strategies.base import FederatedStrategy, Payload
from fedlora.training.loss import per_example_loss


class FedSB(FederatedStrategy):
    """Fed-SB: dW = s B R A, B and A frozen and orthonormal, only R [r, r] travels (Singhal et al., arXiv 2502.15436).

    dW is linear in R, so that the mean of the Rs is exactly the mean of the updates.

    Notes
    -----
    ``method.init`` chooses the start. ``svd`` (default): B and A are the leading singular vectors of W0, R = 0, after
    LoRA-XS; no data is read. ``public``: the published gradient start, on ``data.public``. ``pooled``: the published
    start, on the clients' pooled training examples, as the paper does; no privacy budget covers it.
    """

    name = "fed-sb"
    title = "Fed-SB: square matrices averaged"
    paper = "arXiv 2502.15436"
    parameterisation = "sb"
    trained: ClassVar[tuple[str, ...]] = ("sb_R",)
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 6e-2, "sgd": 1.0}

    @property
    def covers_init(self) -> bool:
        """False for the pooled start, which reads private data without noise."""
        return self.config.method.init != "pooled"

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """Return B, A and R for every layer, by ``method.init``."""
        rank = self.config.method.rank
        if self.config.method.init == "svd":
            factors = {p: sb.factors_from_weight(dense_weight(a.base).cpu(), rank) for p, a in adapted.adapters.items()}
        else:
            gradients = mean_gradients(adapted, *self._start_examples(data), self.config.server.batch_size)
            # s multiplies R as well: dW = s B R A is to start at the step, whatever alpha.
            rate = self.config.method.init_learning_rate / self.config.scaling()
            factors = {path: sb.factors_from_gradient(g, rank, rate) for path, g in gradients.items()}
        return {f"{path}.{name}": value for path, parts in factors.items() for name, value in parts.items()}

    def _start_examples(self, data: FederatedData) -> tuple[TokenTable, np.ndarray]:
        table = data.public if self.config.method.init == "public" else data.train
        if table is None:
            raise InputError("method.init", "public", "needs data.public: examples that the server may read")
        if self.config.method.init == "pooled":
            rows = np.concatenate([np.asarray(data.partition[i]) for i in range(len(data.partition))])
        else:
            rows = np.arange(len(table))
        rng = np.random.default_rng([self.config.run.seed, 0xB])
        return table, np.sort(rng.permutation(rows)[: self.config.method.init_examples])

    @classmethod
    def payload(cls, layers: list[tuple[int, int]], rank: int, head: int) -> Payload:
        """r^2 a layer, both ways; B and A once, r (m + n)."""
        numbers = len(layers) * rank * rank + head
        return Payload(initial=sum(rank * (m + n) for m, n in layers), down=numbers, up=numbers)


def mean_gradients(
    adapted: AdaptedModel, table: TokenTable, rows: np.ndarray, batch_size: int
) -> dict[str, torch.Tensor]:
    """Gradient [m, n] of the loss with respect to every adapted layer's W0, averaged over examples."""
    weights = {path: adapter.base.weight for path, adapter in adapted.adapters.items()}
    adapted.model.eval()
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            batch = table.batch(chunk, adapted.device)
            adapted.layout.set_rows([len(chunk)])
            (per_example_loss(adapted.logits(batch), batch["labels"]).sum() / len(rows)).backward()
        gradients = {}
        for path, adapter in adapted.adapters.items():
            gradient = weights[path].grad
            assert isinstance(gradient, torch.Tensor)
            # Conv1D stores its weight, and so its gradient, transposed.
            oriented = gradient if isinstance(adapter.base, torch.nn.Linear) else gradient.T
            gradients[path] = oriented.detach().cpu().clone()
        return gradients
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
