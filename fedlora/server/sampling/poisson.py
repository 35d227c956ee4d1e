"""Poisson sampling: each client is drawn independently, as client-level privacy accounting assumes."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fedlora.server.sampling import ClientSampling


class Poisson(ClientSampling):
    """Each client takes part with probability ``fraction``. A round may have no client at all."""

    name = "poisson"
    independent = True

    def sample(self, present: Collection[int], server_round: int, seed: int, fraction: float) -> list[int]:
        """Draw for each client by its number, whoever else is there."""
        draws = np.random.default_rng([seed, server_round, 0x50]).random(max(present, default=-1) + 1)
        return [client for client in sorted(present) if draws[client] < fraction]

    def most(self, clients: int, fraction: float) -> int:
        """Return the number of all clients: each may be drawn."""
        return clients
