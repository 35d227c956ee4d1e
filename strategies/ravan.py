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
from fedlora.strategies.base import Contact, FederatedStrategy, Payload, Sizes
from fedlora.strategies.weight_svd import weight_svd


class RavanOptions(heads.HeadsSection):
    """``[method]`` of a run of RAVAN."""

    init: Literal["svd", "orthogonal"] = Field(
        default="svd",
        description="What B and A start from: the singular vectors of the weights, dealt to the heads in turn (svd), "
        "or a random draw made orthonormal across all heads (orthogonal).",
    )


class Ravan(FederatedStrategy):
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
        rank, number = sizes.rank, self.options.heads
        numbers = len(sizes.layers) * number * rank * rank + sizes.head
        return Payload(initial=sum(number * rank * (m + n) for m, n in sizes.layers), down=numbers, up=numbers)
