"""The SB square matrix: dW = s B R A with B and A frozen and orthonormal, R [r, r] trained.

LoRA-XS (arXiv 2405.17604) takes B and A from the singular vectors of W0; LoRA-SB (arXiv 2411.19557) takes them from
one sign step along an averaged gradient.
"""

from __future__ import annotations

import torch

from fedlora.adapters.parameterisations import LowRank
from fedlora.arrays import Arrays
from fedlora.svd import TruncatedSVD, truncated_svd


class SB(LowRank):
    """A square matrix between two frozen factors."""

    name = "sb"

    def shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, int]]:
        """A [r, n], R [r, r] and B [m, r]."""
        return {"sb_A": (rank, in_features), "sb_R": (rank, rank), "sb_B": (out_features, rank)}

    def to_lora(self, factors: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
        """Fold R into B: B R A = (B R) A is a plain LoRA of the same rank."""
        return factors["sb_A"], factors["sb_B"] @ factors["sb_R"]


def leading_pairs(weight: torch.Tensor, rank: int) -> TruncatedSVD:
    """Return the leading singular values and vectors of W0 [m, n], with fixed signs, as arrays of a model."""
    return truncated_svd(weight, rank).signed().to(_kept(weight.dtype))


def factors_from_pairs(pairs: TruncatedSVD) -> Arrays:
    """Start without data, after LoRA-XS: B and A are the leading singular vectors of W0, and R = 0."""
    return {"sb_A": pairs.vh, "sb_R": torch.diag(torch.zeros_like(pairs.s)), "sb_B": pairs.u}


def factors_from_gradient(gradient: torch.Tensor, rank: int, learning_rate: float) -> Arrays:
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
    pairs = truncated_svd(torch.sign(gradient), rank, scale=-learning_rate).signed().to(_kept(gradient.dtype))
    return {"sb_A": pairs.vh, "sb_R": torch.diag(pairs.s), "sb_B": pairs.u}


def _kept(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
