"""Fed-SB: averaging of small square matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from fedlora.adapters import AdaptedModel
from fedlora.adapters.parameterisations import sb
from fedlora.arrays import Arrays
from fedlora.config import NODES, Config, LearningRate, Positive
from fedlora.data.tokens import FederatedData, TokenTable
from fedlora.errors import InputError
from fedlora.ranks import RankedOptions
from fedlora.roles import FROZEN, HEAD, TRAINED, Roles
from fedlora.strategies.base import Contact, Payload, Sizes
from fedlora.strategies.ranked import RankedStrategy
from fedlora.strategies.weight_svd import weight_svd

_READ_BY_START: dict[str, Literal["nothing", "public", "private"]] = {
    "svd": "nothing",
    "public": "public",
    "pooled": "private",
}
"""By ``method.init``."""


class FedSBOptions(RankedOptions):
    """``[method]`` of a run of Fed-SB."""

    init: Literal["svd", "public", "pooled"] = Field(
        default="svd",
        description="What B and A start from: the weights (svd), or a gradient on data.public (public) or on the "
        "clients' pooled training examples (pooled), which no privacy covers.",
    )
    init_examples: Positive = Field(default=500, description="At most so many examples that the gradient is taken on.")
    init_learning_rate: LearningRate = Field(default=1e-4, description="Step along the gradient that dW starts at.")
    init_not_covered: bool = Field(
        default=False, description="Allow the pooled start under privacy: epsilon does not cover what it reads."
    )


class FedSB(RankedStrategy):
    """Fed-SB: dW = s B R A, B and A frozen and orthonormal, only R [r, r] travels (Singhal et al., arXiv 2502.15436).

    dW is linear in R, so that the mean of the Rs is exactly the mean of the updates. A client of a smaller rank trains
    the leading block of R between the first columns of B and rows of A, which is exact too.

    Notes
    -----
    ``method.init`` chooses the start. ``svd`` (default): B and A are the leading singular vectors of W0, R = 0, after
    LoRA-XS; no data is read. Of a large W0 they are nearly the leading ones (:func:`fedlora.svd.truncated_svd`).
    ``public``: the published gradient start, on ``data.public``. ``pooled``: the published start, on the clients'
    pooled training examples, as the paper does; no privacy budget covers it.
    """

    name = "fed-sb"
    title = "Fed-SB: square matrices averaged"
    paper = "arXiv 2502.15436"
    sends = "R: r² each way"
    exact = True
    color, marker = "blue", "circle"
    Options = FedSBOptions
    options: FedSBOptions
    parameterisation = "sb"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 6e-2, "sgd": 1.0}

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """R is trained; B and A are sent once."""
        return {"sb_A": FROZEN, "sb_B": FROZEN, "sb_R": TRAINED, HEAD: TRAINED}

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a start that reads examples which are not there, or private ones without leave; check the ranks."""
        super().check(config)
        options = config.method
        assert isinstance(options, FedSBOptions)
        if options.init == "pooled" and config.data.name == NODES:
            remedy = "reads the clients' examples, which nodes keep; use svd or public"
            raise InputError("method.init", "pooled", remedy)
        if options.init == "public" and config.data.public is None:
            raise InputError("method.init", "public", "needs data.public: examples that the server may read")
        if options.init == "pooled" and config.privacy.mode != "none" and not options.init_not_covered:
            remedy = (
                "reads private data without noise, so epsilon would not cover it; "
                "use svd, or set method.init_not_covered = true"
            )
            raise InputError("method.init", "pooled", remedy)

    @classmethod
    def unused(cls, config: Config) -> Iterator[tuple[str, str]]:
        """Only a start from a gradient reads examples."""
        assert isinstance(config.method, FedSBOptions)
        if config.method.init == "svd":
            yield "init_examples init_learning_rate init_not_covered", "init svd needs no data"

    @classmethod
    def start_reads(cls, config: Config) -> Literal["nothing", "public", "private"]:
        """The pooled start reads private data without noise."""
        assert isinstance(config.method, FedSBOptions)
        return _READ_BY_START[config.method.init]

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """Return B, A and R for every layer, by ``method.init``."""
        rank = self.options.rank
        if self.options.init == "svd":
            factors = {path: sb.factors_from_pairs(pairs) for path, pairs in weight_svd(adapted, rank).items()}
        else:
            gradients = mean_gradients(adapted, *self._start_examples(data), self.config.server.batch_size)
            # s multiplies R as well: dW = s B R A is to start at the step, whatever alpha.
            rate = self.options.init_learning_rate / self.config.scaling()
            factors = {path: sb.factors_from_gradient(g, rank, rate) for path, g in gradients.items()}
        return {f"{path}.{name}": value for path, parts in factors.items() for name, value in parts.items()}

    def _start_examples(self, data: FederatedData) -> tuple[TokenTable, np.ndarray]:
        table = data.public if self.options.init == "public" else data.train
        if table is None:
            raise InputError("method.init", "public", "needs data.public: examples that the server may read")
        if self.options.init == "pooled":
            rows = np.concatenate([np.asarray(data.partition[i]) for i in range(len(data.partition))])
        else:
            rows = np.arange(len(table))
        rng = np.random.default_rng([self.config.run.seed, 0xB])
        return table, np.sort(rng.permutation(rows)[: self.options.init_examples])

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """r^2 a layer, both ways; B and A once, r (m + n)."""
        rank = sizes.rank
        numbers = len(sizes.layers) * rank * rank + sizes.head
        return Payload(initial=sum(rank * (m + n) for m, n in sizes.layers), down=numbers, up=numbers)


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
            (table.task.loss(adapted.outputs(batch, table.task), batch["labels"]).sum() / len(rows)).backward()
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
