"""FedIT: federated averaging of both LoRA factors."""

from __future__ import annotations

from typing import ClassVar

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.roles import HEAD, TRAINED, Roles
from fedlora.strategies.base import Contact, FederatedStrategy, Payload, Sizes, drawn_factors


class FedIT(FederatedStrategy):
    """FedIT: A = sum p_i A_i and B = sum p_i B_i (Zhang et al., arXiv 2305.05644).

    The mean of the factors is not the mean of the updates: sum p_i B_i A_i differs from it by
    sum p_i (B_i - Bbar)(A_i - Abar). The other methods exist to avoid that; this one is their baseline.
    """

    name = "fedit"
    title = "FedIT: both factors averaged"
    paper = "arXiv 2305.05644"
    sends = "A and B: r (m + n) each way"
    color, marker = "green", "diamond"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-2, "sgd": 0.1}

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """Both factors are trained."""
        return {"lora_A": TRAINED, "lora_B": TRAINED, HEAD: TRAINED}

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """A drawn for every layer, B = 0."""
        return drawn_factors(adapted, self.config.run.seed)

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """r (m + n) a layer, both ways."""
        numbers = sum(sizes.rank * (m + n) for m, n in sizes.layers) + sizes.head
        return Payload(initial=0, down=numbers, up=numbers)
