"""FedSVD: B is trained, and A turned by the server after every round."""

from __future__ import annotations

from typing import ClassVar

import torch

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.roles import HEAD, TRAINED, Role, Roles
from fedlora.strategies.base import Contact, Payload, Sizes, drawn_factors
from fedlora.strategies.ranked import RankedStrategy
from fedlora.strategies.updates import Updates
from fedlora.transport import PERSISTS, Transport, along_rows


class FedSVD(RankedStrategy):
    """FedSVD: clients train B beside a frozen A; the server refactors Bbar A by SVD (Lee et al., arXiv 2505.12805).

    dW = s B A is linear in B, so that the mean of the Bs is exactly the mean of the updates, and under DP-SGD noise
    enters it linearly. After every round A becomes the leading right singular vectors of the mean: its rows stay
    orthonormal, and turn towards the directions that matter. That reads only what clients released, so that epsilon
    stays what it is. A client of a smaller rank gets the leading directions of A, and trains the first columns of B.

    Notes
    -----
    No m x n matrix is made. With Bbar = Q R and the SVD R = U S V^T of r x r, Bbar A = (Q U) S (V^T A), and V^T A has
    orthonormal rows as A has; where Bbar lost rank, V completes them from A's row space.

    So A turns within the row space that was drawn, by the orthogonal A_t A_(t+1)^T. What is linear in moves of B, such
    as a momentum or a control variate, is carried over by it and loses nothing. A second moment is not linear: the
    squares of turned numbers depend on products that were never kept. Adaptive optimisers with a memory are refused.

    A client of a smaller rank holds only the leading rows of A, and these span another space after every round. What it
    keeps itself (its momentum, or what a codec left out) is projected onto the new rows, and the rest is lost.
    The server's momentum is of the whole A, and loses nothing.
    """

    name = "fedsvd"
    title = "FedSVD: B averaged, A refactored by SVD"
    paper = "arXiv 2505.12805"
    sends = "up B: r m; down A and B: r (m + n)"
    exact = True
    color, marker = "sky", "right"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-2, "sgd": 0.5}
    persistent = False

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """B is trained; A is sent in every round, since the server changes it."""
        return {"lora_A": Role(down="round"), "lora_B": TRAINED, HEAD: TRAINED}

    @classmethod
    def transport(cls, kind: str) -> Transport | None:
        """B's columns are coordinates along the rows of A; the head's stay what they are."""
        return {"lora_B": Transport("lora_A", along_rows), HEAD: PERSISTS}.get(kind)

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """A drawn for every layer, with its rows made orthonormal; B = 0."""
        start = drawn_factors(adapted, self.config.run.seed)
        for name in [name for name in start if name.endswith(".lora_A")]:
            start[name] = torch.linalg.qr(start[name].double().T)[0].T
        return start

    def aggregate(self, updates: Updates) -> Arrays | None:
        """Return the mean of the Bs, refactored together with A."""
        mean = super().aggregate(updates)
        if mean is None:
            return None
        for name in [name for name in mean if self.kind(name) == "lora_B"]:
            other = name.removesuffix("lora_B") + "lora_A"
            mean[name], mean[other] = refactored(mean[name], self.arrays[other])
        return mean

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """r m a layer up, r (m + n) down."""
        up = sum(sizes.rank * m for m, _ in sizes.layers) + sizes.head
        return Payload(initial=0, down=up + sum(sizes.rank * n for _, n in sizes.layers), up=up)


def refactored(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U S and V^T of B A = U S V^T, of r singular values.

    Parameters
    ----------
    b : Tensor [m, r]
    a : Tensor [r, n]
        With orthonormal rows.
    """
    q, r = torch.linalg.qr(b.double())
    u, s, vh = torch.linalg.svd(r)
    return ((q @ u) * s).to(b.dtype), (vh @ a.double()).to(a.dtype)
