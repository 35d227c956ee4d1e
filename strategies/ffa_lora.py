"""FFA-LoRA: LoRA with A frozen at its draw."""

from __future__ import annotations

from typing import ClassVar

from fedlora.adapters import AdaptedModel
from fedlora.communication.wire import Arrays
from fedlora.data.tokens import FederatedData
from fedlora.strategies.base import FederatedStrategy, Payload, drawn_factors


class FFALoRA(FederatedStrategy):
    """FFA-LoRA: dW = s B A0 with A0 drawn once, equal on all clients and never trained (Sun et al., arXiv 2403.12313).

    dW is linear in B, so that the mean of the Bs is exactly the mean of the updates; and under DP-SGD the noise enters
    dW linearly, as xi A0, without the product of two noises that plain LoRA has.
    """

    name = "ffa-lora"
    title = "FFA-LoRA: A frozen, B averaged"
    paper = "arXiv 2403.12313"
    parameterisation = "lora"
    trained: ClassVar[tuple[str, ...]] = ("lora_B",)
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 4e-2, "sgd": 1.0}

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """A0 drawn for every layer, B = 0."""
        return drawn_factors(adapted, self.config.run.seed)

    @classmethod
    def payload(cls, layers: list[tuple[int, int]], rank: int, head: int) -> Payload:
        """r m a layer, both ways; A0 once, r n."""
        numbers = sum(rank * m for m, _ in layers) + head
        return Payload(initial=sum(rank * n for _, n in layers), down=numbers, up=numbers)
