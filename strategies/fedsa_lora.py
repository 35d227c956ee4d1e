"""FedSA-LoRA: A is shared, B and the head stay with each client."""

from __future__ import annotations

from typing import ClassVar

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.roles import HEAD, TRAINED, Role, Roles
from fedlora.strategies.base import Contact, FederatedStrategy, Payload, Sizes, drawn_factors

_STAYS = Role(trained=True, home=True)


class FedSALoRA(FederatedStrategy):
    """FedSA-LoRA: both factors are trained, and A alone is averaged (Guo et al., arXiv 2410.01463).

    Client i has the model W0 + s B_i A with a head of its own. Of A the paper says that it learns what clients have in
    common, and of B what sets them apart. B_i and the head never leave the client: they are in its Flower state in a
    simulation, and in the node's directory on a real node.

    Notes
    -----
    There is no global model. Clients score their own models on test examples of their own, if
    ``server.fraction_evaluate`` asks them to; the scores are personalised, and never compared with those of a global
    model. Under DP-SGD the gradients of A, B and the head are clipped together: epsilon covers what stays at home too.
    """

    name = "fedsa-lora"
    title = "FedSA-LoRA: A averaged, B and the head personal"
    paper = "arXiv 2410.01463"
    sends = "A: r n each way; B and the head stay with the client"
    color, marker = "purple", "left"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-2, "sgd": 0.1}

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """A is averaged; B and the head are trained and stay."""
        return {"lora_A": TRAINED, "lora_B": _STAYS, HEAD: _STAYS}

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """A drawn for every layer; each client's B starts at 0 by itself, so that no B is ever sent."""
        drawn = drawn_factors(adapted, self.config.run.seed)
        return {name: array for name, array in drawn.items() if self.kind(name) == "lora_A"}

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """r n a layer, both ways; the head's start once."""
        numbers = sum(sizes.rank * n for _, n in sizes.layers)
        return Payload(initial=sizes.head, down=numbers, up=numbers)
