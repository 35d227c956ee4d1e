"""Rotary positions of a decoder's queries and keys on a GPU, in one kernel.

PyTorch takes them apart into a dozen kernels a layer, each of which reads and writes all queries or keys.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedlora.kernels.activations import carries

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings Triton where it brings CUDA
    triton = None

ROTARY = "apply_rotary_pos_emb"
"""The function of a transformers model that turns queries and keys by their positions."""


def use_rotary_kernel(model: nn.Module) -> None:
    """Let the code of a model turn queries and keys on a GPU by the kernel; elsewhere it does what it did.

    Transformers calls the function by its name in the module that defines the model.
    """
    for name in {cls.__module__ for module in model.modules() for cls in type(module).__mro__}:
        code: Any = sys.modules.get(name)
        stock = getattr(code, ROTARY, None)
        if triton is None or stock is None or isinstance(stock, _Rotary) or not _turns_halves(stock):
            continue
        code.apply_rotary_pos_emb = _Rotary(stock)


def _turns_halves(stock: Callable[..., Any]) -> bool:
    """Whether a function turns the pairs (x_i, x_(i + d/2)) of each head by cos and sin [N, T, d]."""
    x = torch.linspace(-1, 1, 2 * 2 * 3 * 8, dtype=torch.float64).view(2, 2, 3, 8)
    cos, sin = (f(torch.linspace(0, 3, 2 * 3 * 8, dtype=torch.float64)).view(2, 3, 8) for f in (torch.cos, torch.sin))
    expected = x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None]
    try:
        found = stock(x, -x, cos, sin)
    except (TypeError, ValueError, RuntimeError):
        return False
    return len(found) == 2 and all(torch.allclose(f, e) for f, e in zip(found, (expected, -expected), strict=True))


class _Rotary:
    """Transformers' function, by the kernel where that carries the tensors."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        self.stock = stock
        functools.update_wrapper(self, stock)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any
    ) -> Any:
        if more or named or not turns(q, k, cos, sin):
            return self.stock(q, k, cos, sin, *more, **named)
        return turned(q, k, cos, sin)


def turns(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the kernel carries these queries and keys."""
    rows, _, tokens, width = q.shape
    return (
        carries(q, k, cos, sin)
        and cos.shape == sin.shape
        and cos.stride() == sin.stride()
        and cos.shape in ((1, tokens, width), (rows, tokens, width))
        and (k.shape[0], *k.shape[2:]) == (rows, tokens, width)
        and width % 2 == 0
        and q.stride(-1) == k.stride(-1) == cos.stride(-1) == 1
    )


def turned(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys by their positions, x cos + (-x_2, x_1) sin with the halves x_1 and x_2 of each head.

    Parameters
    ----------
    q, k : Tensor [N, heads, T, d]
        Of unlike numbers of heads.
    cos, sin : Tensor [N, T, d] or [1, T, d]

    Returns
    -------
    (Tensor [N, heads, T, d], Tensor [N, heads, T, d])
        In memory by token, as attention and the layers before it have them.
    """
    pair: tuple[torch.Tensor, torch.Tensor] = _Turned.apply(q, k, cos, sin)
    return pair


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k = (g if g.stride(-1) == 1 else g.contiguous() for g in gradients)
        cos, sin = ctx.saved_tensors
        return *_turn(q, k, cos, sin, back=True), None, None


def _turn(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, tokens, width = q.shape
    made = [x.new_empty(rows, tokens, x.shape[1], width).transpose(1, 2) for x in (q, k)]
    strides = [x.stride(axis) for x in (q, k, *made) for axis in (0, 1, 2)]
    by_row = cos.stride(0) if len(cos) > 1 else 0
    with torch.cuda.device_of(q):
        _rotary[rows * tokens, 2](
            q,
            k,
            *made,
            cos,
            sin,
            *strides,
            by_row,
            cos.stride(1),
            tokens,
            heads,
            k.shape[1],
            HALF=width // 2,
            HEADS=triton.next_power_of_2(max(heads, k.shape[1])),
            SIZE=triton.next_power_of_2(width // 2),
            BACK=back,
        )
    return made[0], made[1]


if triton is not None:

    @triton.jit
    def _turn_heads(  # type: ignore[no-untyped-def]
        x, y, x_head, y_head, heads, h, d, cos_1, cos_2, sin_1, sin_2, HALF: tl.constexpr, BACK: tl.constexpr
    ):
        """Turn all heads of one token."""
        inside = (h[:, None] < heads) & (d[None, :] < HALF)
        first = tl.load(x + h[:, None] * x_head + d[None, :], mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + h[:, None] * x_head + HALF + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if BACK:
            one, two = first * cos_1 + second * sin_2, second * cos_2 - first * sin_1
        else:
            one, two = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
        tl.store(y + h[:, None] * y_head + d[None, :], one.to(y.dtype.element_ty), mask=inside)
        tl.store(y + h[:, None] * y_head + HALF + d[None, :], two.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _rotary(  # type: ignore[no-untyped-def]
        q,
        k,
        new_q,
        new_k,
        cos,
        sin,
        q_row,
        q_head,
        q_token,
        k_row,
        k_head,
        k_token,
        new_q_row,
        new_q_head,
        new_q_token,
        new_k_row,
        new_k_head,
        new_k_token,
        by_row,
        by_token,
        tokens,
        q_heads,
        k_heads,
        HALF: tl.constexpr,
        HEADS: tl.constexpr,
        SIZE: tl.constexpr,
        BACK: tl.constexpr,
    ):
        """Turn one token's queries, or its keys."""
        row, t = (tl.program_id(0) // tokens).to(tl.int64), tl.program_id(0) % tokens
        h, d = tl.arange(0, HEADS), tl.arange(0, SIZE)
        place = row * by_row + t * by_token + d
        cos_1 = tl.load(cos + place, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        cos_2 = tl.load(cos + place + HALF, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        sin_1 = tl.load(sin + place, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        sin_2 = tl.load(sin + place + HALF, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        if tl.program_id(1) == 0:
            x, y = q + row * q_row + t * q_token, new_q + row * new_q_row + t * new_q_token
            _turn_heads(x, y, q_head, new_q_head, q_heads, h, d, cos_1, cos_2, sin_1, sin_2, HALF, BACK)
        else:
            x, y = k + row * k_row + t * k_token, new_k + row * new_k_row + t * new_k_token
            _turn_heads(x, y, k_head, new_k_head, k_heads, h, d, cos_1, cos_2, sin_1, sin_2, HALF, BACK)
