"""The mean of the updates that are closest to the others."""

from __future__ import annotations

from fedlora.server.aggregators.krum import Krum


class MultiKrum(Krum):
    """Multi-Krum (Blanchard et al. 2017, arXiv 1703.02757): the mean of all but the f updates that are farthest off."""

    name = "multi-krum"

    def keeps(self, clients: int) -> int:
        """All but ``malicious_clients``."""
        return clients - self.server.malicious_clients
