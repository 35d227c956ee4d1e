"""The SB square matrix: dW = s B R A with B and A frozen and orthonormal, R [r, r] trained.

LoRA-XS (arXiv 2405.17604) takes B and A from the singular vectors of W0; LoRA-SB (arXiv 2411.19557) takes them from
one sign step along an averaged gradient.
"""

from __future__ import annotations

import math

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


def sketching_factors(shape: tuple[int, int], width: int, scaling: float, generator: torch.Generator) -> Arrays:
    """Return factors beside which the gradients of the third are sketches of the frozen layer's gradient g [m, n].

    With A = Omega^T and B = 0 the gradient of B is g Omega; with B = Q and A = 0 that of A is Q^T g. In both cases
    dW = 0, so that g is that of the layer as it was loaded.

    Parameters
    ----------
    shape : (int, int)
        (m, n).
    width : int
        k, columns of Omega.
    scaling : float
        s; the branch multiplies by it.
    generator : torch.Generator
        Successive calls give every layer a draw of its own.

    Returns
    -------
    dict
        sb_A = Omega^T [k, n], drawn from N(0, 1/k) so that g Omega has the norm of g on average, and sb_R = I/s.
    """
    omega = torch.randn(width, shape[1], generator=generator) / math.sqrt(width)
    return {"sb_A": omega, "sb_R": torch.eye(width) / scaling}


def sketch_basis(sketch: torch.Tensor) -> torch.Tensor:
    """Return Q = orth(Y), the orthonormal columns [m, k] that span a sketch Y [m, k]."""
    return torch.linalg.qr(sketch.double())[0].to(sketch.dtype)


def factors_from_projection(basis: torch.Tensor, projection: torch.Tensor, rank: int, norm: float) -> Arrays:
    """Finish a randomised SVD (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 5.1).

    Parameters
    ----------
    basis : Tensor [m, k]
        Q, with orthonormal columns.
    projection : Tensor [k, n]
        Q^T D, with D the direction of descent: minus the gradient.
    rank : int
        r, at most k.
    norm : float
        Of R.

    Returns
    -------
    dict
        sb_B = U_r, sb_A = V_r^T and sb_R = diag(S_r) times norm / |S_r|, of U S V^T = Q Q^T D. R is 0 where D is.

    Notes
    -----
    Q Q^T D is D to rounding where D's rank is at most k.
    """
    u, s, vh = torch.linalg.svd(projection.double(), full_matrices=False)
    pairs = TruncatedSVD((basis.double() @ u)[:, :rank], s[:rank], vh[:rank], 0.0).signed()
    length = float(pairs.s.norm())
    found = {"sb_A": pairs.vh, "sb_R": torch.diag(pairs.s * (norm / length if length else 0.0)), "sb_B": pairs.u}
    return {name: array.to(_kept(projection.dtype)).contiguous() for name, array in found.items()}


def _kept(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
