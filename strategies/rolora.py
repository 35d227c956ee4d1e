"""RoLoRA: LoRA's two factors trained in turns."""

from __future__ import annotations

from typing import ClassVar

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.roles import HEAD, TRAINED, Role, Roles
from fedlora.strategies.base import Contact, FederatedStrategy, Payload, Sizes, drawn_factors

_IN_TURN = Role(trained=True, down="stale", up="value")
_WAITING = Role(down="stale")


class RoLoRA(FederatedStrategy):
    """RoLoRA: odd rounds train B, even rounds A, and average the one that was trained (Chen et al., arXiv 2409.02346).

    In each round the other factor is equal on all clients, so that dW = s B A is linear in what is averaged: the mean
    of the factors is exactly the mean of the updates. Unlike FFA-LoRA, both factors learn.

    Notes
    -----
    A client is sent the factors that changed since its last round: the one of the round before, and both if it missed
    a round. Where the first round does not count, B is still 0 in the second, and A stays as it is.
    """

    name = "rolora"
    title = "RoLoRA: the factors trained in turns"
    paper = "arXiv 2409.02346"
    sends = "B in odd rounds, A in even ones: r m or r n each way"
    exact = True
    color, marker = "orange", "down"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-2, "sgd": 0.1}

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """B is trained in odd rounds, A in even ones; either is sent to a client whose copy is not the current one."""
        b, a = (_IN_TURN, _WAITING) if server_round % 2 else (_WAITING, _IN_TURN)
        return {"lora_A": a, "lora_B": b, HEAD: TRAINED}

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """A drawn for every layer, B = 0."""
        return drawn_factors(adapted, self.config.run.seed)

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """r m (B) or r n (A) a layer up; down what changed since the client's last round; once a factor's start."""
        b = sum(sizes.rank * m for m, _ in sizes.layers)
        a = sum(sizes.rank * n for _, n in sizes.layers)
        initial, down = 0, sizes.head
        before = [r for r in contact.replied if r < contact.round]
        b_rounds = [r for r in before if r % 2]
        # While B is 0, A has no gradient; noise and decay move it all the same.
        moving = 0 if self.private or self.config.client.weight_decay else min(b_rounds, default=contact.round)
        a_rounds = [r for r in before if r % 2 == 0 and r > moving]
        for numbers, made in ((b, max(b_rounds, default=0)), (a, max(a_rounds, default=0))):
            if contact.since is None and not made:
                initial += numbers
            elif contact.since is None or made >= contact.since:
                down += numbers
        return Payload(initial, down, up=(b if contact.round % 2 else a) + sizes.head)
