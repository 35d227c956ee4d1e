"""FFA-LoRA: LoRA with A frozen at its draw."""

from __future__ import annotations

from typing import ClassVar

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.roles import FROZEN, HEAD, TRAINED, Roles
from fedlora.strategies.base import Contact, Payload, Sizes, drawn_factors
from fedlora.strategies.ranked import RankedStrategy


class FFALoRA(RankedStrategy):
    """FFA-LoRA: dW = s B A0 with A0 drawn once, equal on all clients and never trained (Sun et al., arXiv 2403.12313).

    dW is linear in B, so that the mean of the Bs is exactly the mean of the updates; and under DP-SGD the noise enters
    dW linearly, as xi A0, without the product of two noises that plain LoRA has. A client of a smaller rank trains the
    first columns of B beside the first rows of A0, which is exact too.
    """

    name = "ffa-lora"
    title = "FFA-LoRA: A frozen, B averaged"
    paper = "arXiv 2403.12313"
    sends = "B: r m each way"
    exact = True
    color, marker = "vermilion", "square"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 4e-2, "sgd": 1.0}

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """B is trained; A is sent once."""
        return {"lora_A": FROZEN, "lora_B": TRAINED, HEAD: TRAINED}

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """A0 drawn for every layer, B = 0."""
        return drawn_factors(adapted, self.config.run.seed)

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """r m a layer, both ways; A0 once, r n."""
        numbers = sum(sizes.rank * m for m, _ in sizes.layers) + sizes.head
        return Payload(initial=sum(sizes.rank * n for _, n in sizes.layers), down=numbers, up=numbers)
