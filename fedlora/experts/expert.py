"""An owner's expert as named arrays, and its arithmetic: truncation, exact combination, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedlora.arrays import Arrays
from fedlora.ranks import FULL as FULL
from fedlora.ranks import Rank as Rank
from fedlora.svd import truncated_svd

Update = tuple[torch.Tensor, torch.Tensor] | torch.Tensor
"""dW of one projection: (B [m, r], A [r, n]) for dW = B A, or dW [m, n] itself."""


@dataclass(frozen=True)
class Expert:
    """What one owner adds to the public model.

    Attributes
    ----------
    owner : str
    rank : int or "full"
    arrays : dict of str to Tensor
        By the public model's module paths: ``PROJECTION.lora_A`` [r, n] and ``PROJECTION.lora_B`` [m, r], or
        ``PROJECTION.delta`` [m, n]; and for every feed-forward block ``BLOCK.router`` [1, d] and ``BLOCK.router_bias``
        [1, 1]. dW = B A, without another factor.
    public_digest : str
        Of the public model that it was trained against; "" where that is not known.
    """

    owner: str
    rank: Rank
    arrays: Arrays
    public_digest: str = ""

    def update(self, projection: str) -> Update:
        """Return dW of a projection, by its module path."""
        if self.rank == FULL:
            return self.arrays[f"{projection}.delta"]
        return self.arrays[f"{projection}.lora_B"], self.arrays[f"{projection}.lora_A"]


def array_shapes(
    projections: Mapping[str, tuple[int, int]], routers: Mapping[str, int], rank: Rank
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an expert's arrays.

    Parameters
    ----------
    projections : mapping of str to (int, int)
        Module path to (outputs m, inputs n).
    routers : mapping of str to int
        Block path to the router's number of inputs.
    rank : int or "full"
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (m, n) in projections.items():
        if rank == FULL:
            shapes[f"{path}.delta"] = (m, n)
        else:
            shapes |= {f"{path}.lora_A": (rank, n), f"{path}.lora_B": (m, rank)}
    for path, width in routers.items():
        shapes |= {f"{path}.router": (1, width), f"{path}.router_bias": (1, 1)}
    return shapes


def numbers(layers: Sequence[tuple[int, int]], rank: Rank) -> int:
    """Count an expert's numbers without its router: r (m + n) a projection, or m n where it is full."""
    return sum(m * n if rank == FULL else rank * (m + n) for m, n in layers)


def break_even_rank(layers: Sequence[tuple[int, int]]) -> float:
    """Rank from which an adapter costs as much as the full matrices: m n / (m + n) where all have one shape."""
    return sum(m * n for m, n in layers) / sum(m + n for m, n in layers)


def dense(update: Update) -> torch.Tensor:
    """Return dW [m, n]."""
    return update if isinstance(update, torch.Tensor) else update[0] @ update[1]


def truncate(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best approximation of dW of a rank: B = U sqrt(S), A = sqrt(S) V^T, after FlexMoRE.

    Parameters
    ----------
    delta : Tensor [m, n]
    rank : int
        At most min(m, n).

    Returns
    -------
    (Tensor [m, r], Tensor [r, n])
        B and A, in the dtype of ``delta``; of a large dW nearly the best (:func:`fedlora.svd.truncated_svd`).
    """
    found = truncated_svd(delta, rank)
    root = found.s.sqrt()
    return (found.u * root).to(delta.dtype), (root[:, None] * found.vh).to(delta.dtype)


def combine(updates: Sequence[tuple[float, Update]], rank: Rank) -> Update:
    """Combine the updates of one domain's clients: sum p_i dW_i, exactly, and then its best approximation of a rank.

    Parameters
    ----------
    updates : sequence of (float, update)
        p_i and dW_i; the p_i sum to 1. The mean of the factors would be another matrix.
    rank : int or "full"

    Returns
    -------
    update
        Of low-rank updates nothing of size m x n is formed: [p_1 B_1 ... p_c B_c] [A_1; ...; A_c] =
        Q_B R_B (Q_A R_A)^T, and the SVD is that of R_B R_A^T.
    """
    first = updates[0][1]
    dtype = (first if isinstance(first, torch.Tensor) else first[0]).dtype
    if rank == FULL:
        total = sum((p * dense(update).double() for p, update in updates), torch.zeros(()))
        return total.to(dtype)
    if any(isinstance(update, torch.Tensor) for _, update in updates):
        total = sum((p * dense(update).double() for p, update in updates), torch.zeros(()))
        return truncate(total.to(dtype), rank)
    b = torch.cat([p * update[0].double() for p, update in updates], 1)
    a = torch.cat([update[1].double() for _, update in updates], 0)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    left, right = q_b @ (u[:, :rank] * root), (root[:, None] * vt[:rank]) @ q_a.T
    # Fewer columns than the rank came together: zeros fill up, so that the expert keeps its declared shape.
    lacking = rank - left.shape[1]
    if lacking > 0:
        left = torch.nn.functional.pad(left, (0, lacking))
        right = torch.nn.functional.pad(right, (0, 0, 0, lacking))
    return left.to(dtype), right.to(dtype)
