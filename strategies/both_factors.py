"""What methods share whose clients train LoRA's A and B together."""

from __future__ import annotations

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.roles import HEAD, TRAINED, Roles
from fedlora.strategies.base import Contact, FederatedStrategy, Payload, Sizes, drawn_factors


class BothFactors(FederatedStrategy):
    """A method whose clients are sent A, B and the head, train all of them, and send them back.

    It says how these arrays travel, what they start from and what they cost. By default the server averages them; a
    method that makes something else of them overrides :meth:`aggregate`.
    """

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """Both factors are trained, and travel both ways in every round."""
        return {"lora_A": TRAINED, "lora_B": TRAINED, HEAD: TRAINED}

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """A drawn for every layer, B = 0."""
        return drawn_factors(adapted, self.config.run.seed)

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """r (m + n) a layer, both ways."""
        numbers = sum(sizes.rank * (m + n) for m, n in sizes.layers) + sizes.head
        return Payload(initial=0, down=numbers, up=numbers)
