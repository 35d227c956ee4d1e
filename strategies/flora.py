"""FLoRA: the clients' factors stacked, and merged into the frozen weights in every round."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.roles import HEAD, INCREMENT, TRAINED, Role, Roles
from fedlora.strategies.base import Contact, Payload, Sizes, drawn_factors
from fedlora.strategies.ranked import RankedStrategy
from fedlora.strategies.updates import Updates, normalised

_OWN = Role(trained=True, down="never", up="value")


class FLoRA(RankedStrategy):
    """FLoRA: factors are stacked, merged, and drawn anew in every round (Wang et al., arXiv 2409.05976).

    With B = [s p_1 B_1 ... s p_c B_c] and A = [A_1; ...; A_c], B A is sum p_i s B_i A_i: the weights enter one factor
    only, and the mean of the updates is exact. Every model adds it to its frozen weights, also that of a client that
    missed the round. The next round starts from a new A and B = 0.

    Notes
    -----
    The new A does not travel: clients draw it from a seed that the message says, as the server does. The stack is sent
    where it is smaller than the matrix itself, else the matrix; so is a client that missed rounds sent the stacks since
    its own, or their sum. Clients may have ranks of their own: their stack is exact as well. Under DP-SGD the noise in
    B_i and A_i is multiplied, as in plain LoRA.
    """

    name = "flora"
    title = "FLoRA: factors stacked and merged"
    paper = "arXiv 2409.05976"
    sends = "up A and B: r (m + n); down the stack of all clients: at most m n"
    exact = True
    reads_single_updates = True
    persistent = False
    color, marker = "orange", "star"
    client = "fedlora.clients.flora:FreshHalf"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-2, "sgd": 0.1}

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """Both factors are trained from a start that clients draw; the residual grows."""
        return {"lora_A": _OWN, "lora_B": _OWN, "residual": INCREMENT, HEAD: TRAINED}

    def know(self, adapted: AdaptedModel) -> None:
        """Keep the model, whose layers the factors are drawn for."""
        super().know(adapted)
        self._adapted = adapted

    def seed(self, counted: int) -> int:
        """Return the seed of the draw after so many rounds that counted; the first is that of other methods' start."""
        seed = self.config.run.seed
        return int(np.random.SeedSequence([seed, counted]).generate_state(1)[0]) if counted else seed

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """A drawn for every layer, B = 0."""
        return drawn_factors(adapted, self.seed(0))

    def client_settings(self, client: int, server_round: int) -> dict[str, str | int | float | bool]:
        """The seed of the round's draw: a round that did not count is made again from the same one."""
        return super().client_settings(client, server_round) | {"draw": self.seed(len(self.replied))}

    def sent_to(self, client: int) -> Arrays:
        """What came down, and the client's own draw."""
        draw = drawn_factors(self._adapted, self.seed(len(self.replied)), self.rank_of(client))
        return super().sent_to(client) | draw

    def aggregate(self, updates: Updates) -> Arrays | None:
        """Return the mean of the heads, the stack as the residual's increment, and the next draw."""
        clients = list(updates)
        mean = self.head_mean(clients)
        if mean is None:
            return None
        shares, factors = normalised(clients), [update.arrays for update in clients]
        stack: Arrays = {}
        for path in self._adapted.adapters:
            b = [arrays[f"{path}.lora_B"] for arrays in factors]
            stack |= self._stacked(path, shares, b, [arrays[f"{path}.lora_A"] for arrays in factors])
        return mean | drawn_factors(self._adapted, self.seed(len(self.replied) + 1)) | stack

    def _stacked(self, path: str, shares: list[float], b: list[torch.Tensor], a: list[torch.Tensor]) -> Arrays:
        """Return the increment of one layer: the stack, or the matrix where that is smaller."""
        scaling = self.config.scaling()
        left = torch.cat([scaling * p * each.double() for p, each in zip(shares, b, strict=True)], 1)
        right, dtype = torch.cat(a), b[0].dtype
        if left.numel() + right.numel() <= len(left) * right.shape[1]:
            return {f"{path}.residual_B": left.to(dtype), f"{path}.residual_A": right}
        return {f"{path}.residual": (left @ right.double()).to(dtype)}

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """r (m + n) a layer up; down the stacks since the client's last round, (sum of ranks) (m + n) a round."""
        up = sum(sizes.rank * (m + n) for m, n in sizes.layers) + sizes.head
        since = 0 if contact.since is None else contact.since
        rounds = [clients for r, clients in contact.replied.items() if since <= r < contact.round]
        ranks = [sum(map(self.rank_of, clients)) for clients in rounds]
        grown = sum(min(rank * (m + n), m * n) for rank in ranks for m, n in sizes.layers)
        return Payload(initial=0, down=sizes.head + min(grown, sum(m * n for m, n in sizes.layers)), up=up)
