"""RAVAN: several heads beside a layer, of which only small square matrices travel."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from fedlora.adapters import AdaptedModel
from fedlora.adapters.model import linear_shape
from fedlora.adapters.parameterisations import heads
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.roles import FROZEN, HEAD, TRAINED, Role, Roles
from fedlora.strategies.aggregation import WeightedMean
from fedlora.strategies.base import Contact, Payload, Sizes
from fedlora.strategies.ranked import RankedStrategy
from fedlora.strategies.updates import Updates
from fedlora.strategies.weight_svd import weight_svd


class RavanOptions(heads.HeadsSection):
    """``[method]`` of a run of RAVAN."""

    init: Literal["svd", "orthogonal"] = Field(
        default="svd",
        description="What B and A start from: the singular vectors of the weights, dealt to the heads in turn (svd), "
        "or a random draw made orthonormal across all heads (orthogonal).",
    )


class Ravan(RankedStrategy):
    """RAVAN: dW = s sum over h of s_h B_h H_h A_h; only the products s_h H_h travel (Raje et al., arXiv 2506.05568).

    B_h and A_h are frozen. A client trains the matrices H_h [r, r] and the scales s_h, and sends s_h H_h. dW is linear
    in these products, so that their mean is exactly the mean of the updates, with trained scales too. The mean becomes
    the next H_h, and s_h is 1 again.

    Notes
    -----
    ``method.rank`` is the rank r of one head, and dW has a rank of heads x r. ``method.init`` chooses the start; H is 0
    in either, so that the model starts at the base model, and no data is read. ``orthogonal`` is the paper's
    Gram-Schmidt start: a random draw whose columns are orthonormal across heads. ``svd`` (default), not in the paper,
    takes the singular vectors of W0 as Fed-SB does. With one head and ``method.train_scales = false`` the method is
    Fed-SB.

    A client of a smaller rank holds, trains and sends the first heads alone: rank / r of them. Each head is averaged
    over the clients of the round that hold it, so that its move is exactly the mean of theirs; one that no client of
    the round holds stays as it was. In the paper such clients hold all heads, and train those of the highest score.
    """

    name = "ravan"
    title = "RAVAN: several square matrices a layer averaged"
    paper = "arXiv 2506.05568"
    sends = "square matrices of the heads: heads × r² each way"
    exact = True
    color, marker = "blue", "star"
    Options = RavanOptions
    options: RavanOptions
    parameterisation = "heads"
    client = "fedlora.clients.ravan:ScalingHalf"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 4e-2, "sgd": 1.0}

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """H is trained and travels as the product; s begins at 1 on the client, and ends there."""
        assert isinstance(config.method, RavanOptions)
        table = {"heads_A": FROZEN, "heads_B": FROZEN, "heads_H": TRAINED, HEAD: TRAINED}
        return table | ({"heads_s": Role(trained=True, down="never")} if config.method.train_scales else {})

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """Return A, B, H and s for every layer, by ``method.init``."""
        rank, number = self.options.rank, self.options.heads
        generator = torch.Generator().manual_seed(self.config.run.seed)
        arrays: Arrays = {}
        pairs = weight_svd(adapted, number * rank) if self.options.init == "svd" else {}
        for path, adapter in adapted.adapters.items():
            if path in pairs:
                found = heads.factors_from_pairs(pairs[path], number)
            else:
                dtype = adapted.parameter(f"{path}.heads_A").dtype
                found = heads.orthogonal_factors(*linear_shape(adapter.base), rank, number, generator, dtype)
            arrays |= {f"{path}.{factor}": found[factor] for factor in adapter.factors}
        return arrays

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """heads x r^2 a layer, both ways; B and A once, heads x r (m + n)."""
        # The client's rank is that of all its heads.
        numbers = len(sizes.layers) * sizes.rank * self.options.rank + sizes.head
        return Payload(initial=sum(sizes.rank * (m + n) for m, n in sizes.layers), down=numbers, up=numbers)

    def mixed_mean(self, updates: Updates) -> Arrays | None:
        """Return the weighted mean of each head over the clients that hold it, and of all else over all clients."""
        each, rest = [WeightedMean() for _ in range(self.options.heads)], WeightedMean()
        for update in updates:
            blocks = {name: array for name, array in update.arrays.items() if self.kind(name) == "heads_H"}
            rest.add({name: array for name, array in update.arrays.items() if name not in blocks}, update.weight)
            for number in range(self.rank_of(update.client) // self.options.rank):
                each[number].add({name: array[number] for name, array in blocks.items()}, update.weight)
        found, means = rest.result(), [mean.result() for mean in each]
        if found is None:
            return None
        for name, before in self.arrays.items():
            if self.kind(name) == "heads_H":
                rows = [old if mean is None else mean[name] for old, mean in zip(before, means, strict=True)]
                found[name] = torch.stack(rows)
        return found
