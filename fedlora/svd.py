"""Truncated singular value decompositions: exact where a matrix is small, randomised where it is large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

VERSION = 1
"""Counts changes of what :func:`truncated_svd` computes, for those who keep its results."""

SMALL = 2**20
"""Matrices of fewer numbers are decomposed exactly: 384 x 1536 and 576 x 1536 are, 512 x 2048 is not."""

_ITERATIONS = 8


@dataclass(frozen=True)
class TruncatedSVD:
    """The leading singular values and vectors of a matrix W [m, n], on the CPU.

    Attributes
    ----------
    u : Tensor [m, r]
        With orthonormal columns.
    s : Tensor [r]
        Descending.
    vh : Tensor [r, n]
        With orthonormal rows.
    error : float
        Largest error of the values, relative to s[0], as :func:`truncated_svd` measures it.
    """

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor
    error: float

    def signed(self) -> TruncatedSVD:
        """Fix the signs: the largest entry of each row of ``vh`` is positive.

        The sign of a singular pair is free. Fixing it makes the result the same for every LAPACK.
        """
        sign = torch.where(self.vh.gather(1, self.vh.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)[:, 0]
        return TruncatedSVD(self.u * sign, self.s, self.vh * sign[:, None], self.error)

    def to(self, dtype: torch.dtype) -> TruncatedSVD:
        """Convert the tensors."""
        return TruncatedSVD(self.u.to(dtype), self.s.to(dtype), self.vh.to(dtype), self.error)


def is_large(shape: Sequence[int]) -> bool:
    """Whether :func:`truncated_svd` does not take the exact way with a matrix [m, n]."""
    return shape[0] * shape[1] >= SMALL


def truncated_svd(matrix: torch.Tensor, rank: int, *, scale: float = 1.0, seed: int = 0) -> TruncatedSVD:
    """Return the leading singular values and vectors of ``scale * matrix``.

    Parameters
    ----------
    matrix : Tensor [m, n]
        On any device, in any floating dtype.
    rank : int
        r, at most min(m, n).
    scale : float
        Any sign.
    seed : int
        Of the random test matrix.

    Returns
    -------
    TruncatedSVD
        In float64 where the matrix is small or is in float64 itself, else in float32.

    Notes
    -----
    A small matrix (:data:`SMALL`) is decomposed in float64 on the CPU; its error is 0, apart from rounding.

    A large one is decomposed on its own device after Halko, Martinsson and Tropp (2011, arXiv 0909.4061, algorithms 4.4
    and 5.1): the range of W is sampled with 2 r Gaussian vectors and refined by eight power iterations, each with QR
    decompositions. The vectors are drawn on the CPU by a generator of their own, so that the result depends on the seed
    alone, on one machine. Where 4 r exceeds min(m, n) that would save little, and the decomposition is a full one.

    The error is that of the result, not an expectation: r of W's singular values lie within ||W V - U S||_2 of those
    returned (Kahan), which are never too large. It is given relative to the largest. That these r are the leading ones
    holds unless the Gaussian vectors missed a leading direction, which has no practical probability. Where singular
    values beyond the rank are nearly as large as those within, the vectors may differ from those of a full
    decomposition by more than the values do.
    """
    if not is_large(matrix.shape):
        u, s, vh = torch.linalg.svd(scale * matrix.cpu().double(), full_matrices=False)
        error = 0.0
    else:
        w = matrix.to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
        few = 4 * rank <= min(w.shape)
        u, s, vh = _randomised(w, 2 * rank, seed) if few else torch.linalg.svd(w, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        rest = w @ vh.T - u * s
        gram = (rest.T @ rest).double().cpu()
        largest = float(s[0])
        error = float(torch.linalg.matrix_norm(gram, 2)) ** 0.5 / largest if largest else 0.0
        u, s, vh = (u if scale >= 0 else -u).cpu(), (abs(scale) * s).cpu(), vh.cpu()
    return TruncatedSVD(u[:, :rank].contiguous(), s[:rank], vh[:rank].contiguous(), error)


def _randomised(w: torch.Tensor, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return approximate leading singular vectors and values, as many as the test matrix has columns."""
    generator = torch.Generator().manual_seed(seed)
    test = torch.randn(w.shape[1], width, generator=generator, dtype=w.dtype).to(w.device)
    q = torch.linalg.qr(w @ test)[0]
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q)[0])[0]
    # W is nearly Q Q^T W = Q (right R)^T: the decomposition itself is of a small square.
    right, r = torch.linalg.qr((w.T @ q).double())
    u, s, vh = (part.to(w.device) for part in torch.linalg.svd(r.T.cpu()))
    return q @ u.to(w.dtype), s.to(w.dtype), (vh @ right.T).to(w.dtype)
