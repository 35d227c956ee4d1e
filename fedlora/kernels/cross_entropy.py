"""Cross-entropy and its gradient in two passes over the logits, the second of which overwrites them.

Step by step, PyTorch widens half-precision logits, takes their softmax, the losses and the gradient, and narrows that:
each is a pass over memory that reads and writes numbers of a whole vocabulary for each token.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings Triton where it brings CUDA
    triton = None


def carried(logits: torch.Tensor) -> bool:
    """Whether the kernel takes these logits: a matrix of half precision on a GPU."""
    return triton is not None and logits.is_cuda and logits.dtype in (torch.bfloat16, torch.float16)


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return each token's loss, and overwrite the logits with its gradient.

    Parameters
    ----------
    logits : Tensor [M, vocabulary]
        Contiguous. Overwritten by the gradient of each token's loss with respect to them.
    targets : Tensor [M] of int64
        -100: no loss, and no gradient.
    scale : float
        The softmax is that of scale times the logits.

    Returns
    -------
    Tensor [M] of float32
        In nats.
    """
    tokens, vocabulary = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        block = min(8192, triton.next_power_of_2(vocabulary))
        by_token = logits.stride(0)
        with torch.cuda.device_of(logits):
            _cross_entropy[tokens,](logits, targets, losses, by_token, scale, vocabulary, BLOCK=block, num_warps=16)
    return losses


if triton is not None:

    @triton.jit
    def _cross_entropy(logits, targets, losses, by_token, scale, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """Do one token."""
        token = tl.program_id(0).to(tl.int64)
        row, target = logits + token * by_token, tl.load(targets + token)
        largest, total = float("-inf"), 0.0
        for first in range(0, VOCABULARY, BLOCK):
            places = first + tl.arange(0, BLOCK)
            x = tl.load(row + places, mask=places < VOCABULARY, other=float("-inf")).to(tl.float32) * scale
            before = largest
            largest = tl.maximum(before, tl.max(x, 0))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)
        logsum = largest + tl.log(total)
        counts = target >= 0
        own = tl.load(row + tl.where(counts, target, 0)).to(tl.float32) * scale
        tl.store(losses + token, tl.where(counts, logsum - own, 0.0))
        factor = tl.where(counts, scale, 0.0)
        for first in range(0, VOCABULARY, BLOCK):
            places = first + tl.arange(0, BLOCK)
            inside = places < VOCABULARY
            x = tl.load(row + places, mask=inside, other=0.0).to(tl.float32) * scale
            gradient = (tl.exp(x - logsum) - tl.where(places == target, 1.0, 0.0)) * factor
            tl.store(row + places, gradient.to(logits.dtype.element_ty), mask=inside)
