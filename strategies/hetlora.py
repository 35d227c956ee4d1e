"""HetLoRA: factors averaged by the size of the clients' updates."""

from __future__ import annotations

import math
from typing import ClassVar

from fedlora.arrays import Arrays, leading, padded
from fedlora.roles import HEAD
from fedlora.strategies.aggregation import weighted_mean
from fedlora.strategies.both_factors import BothFactors
from fedlora.strategies.ranked import RankedStrategy
from fedlora.strategies.replies import ReplyError
from fedlora.strategies.updates import Update, Updates, normalised, update_norm


class HetLoRA(BothFactors, RankedStrategy):
    """HetLoRA: both factors averaged, weighted by the norm of B_i A_i (Cho et al., arXiv 2401.06432).

    A client's weight is its number of examples times the norm of its B_i A_i over all layers together, so that with
    equal norms this is FedIT. The head is averaged by the numbers of examples alone.

    Notes
    -----
    A client of a smaller rank gets the leading rows of A and columns of B, and its factors are padded with zeros; so
    rows that small clients do not hold are averaged with zeros. Rows that no client of a round holds stay as they are.

    The paper weighs by the norm alone, for clients of about as many examples. Its pruning of a client's rank during
    training is not part of this method: a client's rank is what the config says.
    """

    name = "hetlora"
    title = "HetLoRA: factors weighted by the norm of their product"
    paper = "arXiv 2401.06432"
    reads_single_updates = True
    sends = "A and B of the client's rank: r (m + n) each way"
    color, marker = "green", "left"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-2, "sgd": 0.1}

    def aggregate(self, updates: Updates) -> Arrays | None:
        """Return the factors' mean by examples and norm, and the heads' by examples."""
        clients = list(updates)
        head = self.head_mean(clients)
        if head is None:
            return None
        shares = normalised(clients)
        norms = [update_norm(update) for update in clients]
        if not any(p * norm for p, norm in zip(shares, norms, strict=True)):
            norms = [1.0] * len(clients)  # no client has moved B
        factors: list[tuple[Arrays, float]] = []
        for update, p, norm in zip(clients, shares, norms, strict=True):
            own = {name: array for name, array in update.arrays.items() if self.kind(name) != HEAD}
            factors.append(({name: padded(a, self.arrays[name].shape) for name, a in own.items()}, p * norm))
        mean = weighted_mean(factors)
        assert mean is not None  # some client weighs something, as its head does
        held = max((update for update, (_, weight) in zip(clients, factors, strict=True) if weight), key=_size)
        for name, array in mean.items():
            mean[name] = self.arrays[name].clone()
            leading(mean[name], held.shapes[name])[...] = leading(array, held.shapes[name])
        return mean | head

    def check_update(self, update: Update) -> None:
        """Refuse factors that are finite, but whose product is not."""
        if not math.isfinite(update_norm(update)):
            raise ReplyError("its update is not finite")


def _size(update: Update) -> int:
    return update.vector.numel()
