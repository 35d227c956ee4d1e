"""FedEx-LoRA: both factors averaged, and what their mean misses added to the frozen weights."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.roles import INCREMENT, Roles
from fedlora.strategies.aggregation import weighted_mean
from fedlora.strategies.base import Contact, Payload, Sizes
from fedlora.strategies.both_factors import BothFactors
from fedlora.strategies.updates import Updates, normalised


class FedExLoRA(BothFactors):
    """FedEx-LoRA: FedIT, made exact by a residual (Singhal et al., arXiv 2410.09432).

    The mean of the factors misses sum p_i s B_i A_i - s Bbar Abar of the mean of the updates. In every round the server
    computes it, and all models add it to their frozen weights.

    Notes
    -----
    With B_i = Bbar + b_i the residual is sum p_i s b_i (A_i - A_c) over all clients i but any one c, since the p_i b_i
    sum to 0: factors of rank (clients - 1) r. They are sent where they are smaller than the matrix itself, else the
    matrix; so is a client that missed rounds sent the increments since its own, or their sum.
    """

    name = "fedex-lora"
    title = "FedEx-LoRA: both factors averaged, and a residual"
    paper = "arXiv 2410.09432"
    sends = "A and B: r (m + n) each way; down also a residual of at most m n"
    exact = True
    reads_single_updates = True
    color, marker = "green", "plus"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-2, "sgd": 0.1}

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """Both factors are trained; the residual grows."""
        return {**super().roles(config, server_round), "residual": INCREMENT}

    def aggregate(self, updates: Updates) -> Arrays | None:
        """Return the mean of the factors, and the increment of the residual; it needs the factors of all clients."""
        clients = list(updates)
        mean = weighted_mean((update.arrays, update.weight) for update in clients)
        if mean is None or len(clients) == 1:
            return mean
        shares, factors = normalised(clients), [update.arrays for update in clients]
        increment: Arrays = {}
        for name in [name for name in mean if self.kind(name) == "lora_B"]:
            path = name.removesuffix(".lora_B")
            b = [arrays[name] for arrays in factors]
            a = [arrays[f"{path}.lora_A"] for arrays in factors]
            increment |= self._residual(path, shares, b, a)
        return mean | increment

    def _residual(self, path: str, shares: list[float], b: list[torch.Tensor], a: list[torch.Tensor]) -> Arrays:
        """Return the residual of one layer: factors, or the matrix where that is smaller."""
        mean = sum(p * each.double() for p, each in zip(shares, b, strict=True))
        kept = max(range(len(shares)), key=shares.__getitem__)  # one that weighs something
        others = [i for i in range(len(shares)) if i != kept]
        scaling, dtype = self.config.scaling(), b[0].dtype
        left = torch.cat([scaling * shares[i] * (b[i].double() - mean) for i in others], 1)
        right = torch.cat([a[i].double() - a[kept].double() for i in others])
        if left.numel() + right.numel() <= len(left) * right.shape[1]:
            return {f"{path}.residual_B": left.to(dtype), f"{path}.residual_A": right.to(dtype)}
        return {f"{path}.residual": (left @ right).to(dtype)}

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """r (m + n) a layer, both ways; and down the residual since the client's last round."""
        factors = super().payload(sizes, contact)
        since = 0 if contact.since is None else contact.since
        missing = [len(clients) - 1 for r, clients in contact.replied.items() if since <= r < contact.round]
        grown = sum(min(others * sizes.rank * (m + n), m * n) for others in missing for m, n in sizes.layers)
        return replace(factors, down=factors.down + min(grown, sum(m * n for m, n in sizes.layers)))
