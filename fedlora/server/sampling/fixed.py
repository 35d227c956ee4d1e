"""A fixed number of clients in every round."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fedlora.server.sampling import ClientSampling


class Fixed(ClientSampling):
    """A share ``fraction`` of the clients that are there, at least one, drawn without replacement."""

    name = "fixed"

    def sample(self, present: Collection[int], server_round: int, seed: int, fraction: float) -> list[int]:
        """Draw them; nothing is drawn where all are asked."""
        clients = sorted(present)
        count = self.most(len(clients), fraction)
        if count == len(clients):
            return clients
        rng = np.random.default_rng([seed, server_round, 0x5A])
        return sorted(rng.choice(clients, count, replace=False).tolist())

    def most(self, clients: int, fraction: float) -> int:
        """Round to the nearest number, at least 1 where anybody is there."""
        return min(clients, max(1, round(fraction * clients)))
