"""The update that is closest to the others."""

from __future__ import annotations

import torch

from fedlora.server.aggregators import Aggregator


class Krum(Aggregator):
    """Krum (Blanchard et al. 2017, arXiv 1703.02757): the one update whose nearest neighbours are nearest.

    It holds while malicious_clients = f of at least 2 f + 3 clients are wrong.
    """

    name = "krum"
    uses = ("malicious_clients",)

    @property
    def fewest(self) -> int:
        """2 f + 3."""
        return 2 * self.server.malicious_clients + 3

    def keeps(self, clients: int) -> int:
        """How many updates are kept."""
        return 1

    def combine(self, moves: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Average the updates of the lowest scores: the sums of squared distances to the K - f - 2 nearest others."""
        distances = torch.cdist(moves, moves, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = len(moves) - self.server.malicious_clients - 2
        # The nearest of all is the update itself.
        scores = distances.sort(dim=1).values[:, 1 : nearest + 1].sum(dim=1)
        kept = scores.argsort(stable=True)[: self.keeps(len(moves))]
        return moves[kept].mean(dim=0)
