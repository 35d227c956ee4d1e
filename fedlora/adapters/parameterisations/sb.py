"""The SB square matrix: dW = s B R A with B and A frozen and orthonormal, R [r, r] trained.

LoRA-XS (arXiv 2405.17604) takes B and A from the singular vectors of W0; LoRA-SB (arXiv 2411.19557) takes them from
one sign step along an averaged gradient.
"""

from __future__ import annotations

import torch

from fedlora.adapters.parameterisations import LowRank
from fedlora.arrays import Arrays


class SB(LowRank):
    """A square matrix between two frozen factors."""

    name = "sb"

    def shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, int]]:
        """A [r, n], R [r, r] and B [m, r]."""
        return {"sb_A": (rank, in_features), "sb_R": (rank, rank), "sb_B": (out_features, rank)}

    def to_lora(self, factors: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
        """Fold R into B: B R A = (B R) A is a plain LoRA of the same rank."""
        return factors["sb_A"], factors["sb_B"] @ factors["sb_R"]


def _truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    # The sign of a singular pair is free; fixing it makes the start the same for every LAPACK.
    sign = torch.where(vh.gather(1, vh.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)[:, 0]
    return (u * sign)[:, :rank].contiguous(), s[:rank], (vh * sign[:, None])[:rank].contiguous()


def _factors(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return {"sb_A": vh.to(kept), "sb_R": torch.diag(s).to(kept), "sb_B": u.to(kept)}


def factors_from_weight(weight: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """Start without data, after LoRA-XS: B and A are the leading singular vectors of W0 [m, n], and R = 0."""
    u, s, vh = _truncated_svd(weight, rank)
    return _factors(u, torch.zeros_like(s), vh, weight.dtype)


def factors_from_gradient(gradient: torch.Tensor, rank: int, learning_rate: float) -> dict[str, torch.Tensor]:
    """Start of LoRA-SB: the best rank-r approximation U S V^T of one sign step -eta sign(G).

    Parameters
    ----------
    gradient : Tensor [m, n]
        G, the loss's gradient with respect to W0, averaged over examples.
    rank : int
    learning_rate : float
        eta, the length of the sign step.

    Returns
    -------
    dict
        sb_B = U_r, sb_A = V_r^T and sb_R = diag(S_r), so that dW starts at the truncated step.
    """
    u, s, vh = _truncated_svd(-learning_rate * torch.sign(gradient.double()), rank)
    return _factors(u, s, vh, gradient.dtype)
