"""FedIT: federated averaging of both LoRA factors."""

from __future__ import annotations

from typing import ClassVar

from fedlora.adapters import AdaptedModel
from fedlora.communication.wire import Arrays
from fedlora.data.tokens import FederatedData
from fedlora.strategies.base import FederatedStrategy, Payload, drawn_factors


class FedIT(FederatedStrategy):
    """FedIT: A = sum p_i A_i and B = sum p_i B_i (Zhang et al., arXiv 2305.05644).

    The mean of the factors is not the mean of the updates: sum p_i B_i A_i differs from it by
    sum p_i (B_i - Bbar)(A_i - Abar). The other methods exist to avoid that; this one is their baseline.
    """

    name = "fedit"
    title = "FedIT: both factors averaged"
    paper = "arXiv 2305.05644"
    parameterisation = "lora"
    trained: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-2, "sgd": 0.1}

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """A drawn for every layer, B = 0."""
        return drawn_factors(adapted, self.config.run.seed)

    @classmethod
    def payload(cls, layers: list[tuple[int, int]], rank: int, head: int) -> Payload:
        """r (m + n) a layer, both ways."""
        numbers = sum(rank * (m + n) for m, n in layers) + head
        return Payload(initial=0, down=numbers, up=numbers)
