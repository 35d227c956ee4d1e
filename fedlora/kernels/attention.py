"""Attention of short rows on a GPU, in one kernel forward and one backward.

Flash attention is made for long rows. It cuts the queries into blocks, adds the gradients of several blocks in memory,
and pads a row of 64 tokens to its block of 128. Where a row's scores fit into one program, all of that falls away: the
scores are computed again in the backward pass, with the sums that the forward pass kept, nothing is added in memory,
and the result is the same at every run.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings Triton where it brings CUDA
    triton = None

NAME = "fedlora_short"
"""By which transformers' models ask for it."""

TOKENS = 128
"""Longest row: with more, the scores no longer fit into a program's registers."""

HEAD_DIM = 128
"""Widest head."""


def use_short_attention(model: Any) -> bool:
    """Let a model on a GPU attend by these kernels, where it asks transformers' interface for its attention.

    Parameters
    ----------
    model : transformers.PreTrainedModel

    Returns
    -------
    bool
        Whether it does.
    """
    ways = {getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")}
    if triton is None or ways != {"sdpa"}:
        return False
    model.set_attn_implementation(NAME)
    return True


def short_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' ``sdpa_attention_forward`` does, which is called for what the kernels do not carry.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer.
    query, key, value : Tensor [N, heads, T, head_dim]
    attention_mask : Tensor [N, 1, T, T] or [N, 1, 1, T] of bool, optional
        True where a query sees a key.
    dropout : float
    scaling : float, optional
        1 / sqrt(head_dim) by default.
    is_causal : bool, optional
        As the layer says by default.

    Returns
    -------
    Tensor [N, T, heads, head_dim], None
    """
    bias = others.get("position_bias") is not None or others.get("softcap") is not None
    if dropout or bias or not carried(query, key, value, attention_mask):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **others,
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal and attention_mask is None and query.shape[2] > 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return short_attention(query, key, value, attention_mask, scale, causal), None


# At import, for processes that get a model from another one, its way of attending with it.
AttentionInterface.register(NAME, short_attention_forward)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def carried(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the kernels carry an attention: short rows of half precision, as many keys' heads as queries'."""
    rows, heads, tokens, width = query.shape
    shapes = (rows, 1, tokens, tokens), (rows, 1, 1, tokens)
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and key.shape == value.shape == query.shape
        and 0 < tokens <= TOKENS
        and width <= HEAD_DIM
        and rows * heads > 0
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and (mask is None or (mask.dtype == torch.bool and mask.shape in shapes))
    )


def short_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """Return softmax(scale q k^T) v of each head, in one kernel.

    Parameters
    ----------
    query, key, value : Tensor [N, heads, T, head_dim]
    mask : Tensor [N, 1, T, T] or [N, 1, 1, T] of bool, optional
        True where a query sees a key. A query that sees none gets zeros.
    scale : float
    causal : bool
        Whether a query sees no later key.

    Returns
    -------
    Tensor [N, T, heads, head_dim]
    """
    output: torch.Tensor = _ShortAttention.apply(query, key, value, mask, scale, causal)
    return output


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        rows, heads, tokens, width = query.shape
        output = query.new_empty(rows, tokens, heads, width)
        totals = query.new_empty(rows * heads, tokens, dtype=torch.float32)
        arguments = _arguments(query, mask, scale, causal)
        tensors = (query, key, value, output.transpose(1, 2))
        with torch.cuda.device_of(query):
            _forward[rows * heads,](*tensors, totals, arguments.pop("mask"), *_strides(*tensors), **arguments)
        ctx.save_for_backward(query, key, value, mask, totals)
        ctx.settings = scale, causal
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask, totals = ctx.saved_tensors
        rows, heads, tokens, width = query.shape
        # As the layers before made them: [N, T, heads, head_dim], so that nobody copies them.
        made = [query.new_empty(rows, tokens, heads, width).transpose(1, 2) for _ in range(3)]
        arguments = _arguments(query, mask, *ctx.settings)
        gradient = gradients[0] if gradients[0].stride(-1) == 1 else gradients[0].contiguous()
        tensors = (query, key, value, gradient.transpose(1, 2), *made)
        if arguments["T"] == TOKENS and arguments["D"] <= TOKENS // 2:
            # Two programs then fit into a multiprocessor, at the price of a few spilled registers. Measured on an H200,
            # for 12,288 heads of 128 x 64: 0.67 ms instead of 0.79.
            arguments["maxnreg"] = 128
        with torch.cuda.device_of(query):
            _backward[rows * heads,](*tensors, totals, arguments.pop("mask"), *_strides(*tensors), **arguments)
        return *made, None, None, None


def _arguments(query: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool) -> dict[str, Any]:
    """Return what both kernels are told beside their tensors."""
    _, heads, tokens, width = query.shape
    size = max(16, triton.next_power_of_2(tokens))
    return {
        "mask": query if mask is None else mask.view(torch.uint8),
        "mask_row": 0 if mask is None else mask.stride(0),
        "mask_query": 0 if mask is None or mask.shape[2] == 1 else mask.stride(2),
        "mask_key": 0 if mask is None else mask.stride(3),
        "heads": heads,
        "tokens": tokens,
        "scale": scale,
        "WIDTH": width,
        "T": size,
        "D": max(16, triton.next_power_of_2(width)),
        "CAUSAL": causal,
        "MASKED": mask is not None,
        # Measured on an H200, before the backward pass read the forward pass' sums.
        "num_warps": 4 if size < 128 else 8,
    }


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Return each tensor's strides by row, head and token; along the head's width they are contiguous."""
    return [tensor.stride(axis) for tensor in tensors for axis in (0, 1, 2)]


if triton is not None:

    @triton.jit
    def _load(pointer, row, head, tokens, by_row, by_head, by_token, t, d, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        """Load positions t of a head, zeros past its end."""
        places = pointer + row * by_row + head * by_head + t[:, None] * by_token + d[None, :]
        return tl.load(places, mask=(t[:, None] < tokens) & (d[None, :] < WIDTH), other=0.0)

    @triton.jit
    def _store(pointer, values, row, head, tokens, by_row, by_head, by_token, t, d, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        places = pointer + row * by_row + head * by_head + t[:, None] * by_token + d[None, :]
        tl.store(places, values.to(pointer.dtype.element_ty), mask=(t[:, None] < tokens) & (d[None, :] < WIDTH))

    @triton.jit
    def _scores(  # type: ignore[no-untyped-def]
        q, k, scale, mask, row, mask_row, mask_query, mask_key, tokens, t, CAUSAL: tl.constexpr, MASKED: tl.constexpr
    ):
        """Return the scores of queries for keys; minus infinity where a query does not see a key."""
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = (t[:, None] < tokens) & (t[None, :] < tokens)
        if CAUSAL:
            seen = seen & (t[:, None] >= t[None, :])
        if MASKED:
            places = mask + row * mask_row + t[:, None] * mask_query + t[None, :] * mask_key
            seen = seen & (tl.load(places, mask=seen, other=0) != 0)
        return tl.where(seen, scores, float("-inf"))

    @triton.jit
    def _forward(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        o,
        totals,
        mask,
        q_row,
        q_head,
        q_token,
        k_row,
        k_head,
        k_token,
        v_row,
        v_head,
        v_token,
        o_row,
        o_head,
        o_token,
        mask_row,
        mask_query,
        mask_key,
        heads,
        tokens,
        scale,
        WIDTH: tl.constexpr,
        T: tl.constexpr,
        D: tl.constexpr,
        CAUSAL: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        """Attend in one head of one row; keep log sum exp of each query's scores, infinite if it sees no key."""
        row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        t, d = tl.arange(0, T), tl.arange(0, D)
        queries = _load(q, row, head, tokens, q_row, q_head, q_token, t, d, WIDTH)
        keys = _load(k, row, head, tokens, k_row, k_head, k_token, t, d, WIDTH)
        scores = _scores(queries, keys, scale, mask, row, mask_row, mask_query, mask_key, tokens, t, CAUSAL, MASKED)
        largest = tl.max(scores, 1)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp(scores - largest[:, None])
        total = tl.sum(weights, 1)
        weights = weights / tl.where(total == 0.0, 1.0, total)[:, None]
        kept = tl.where(total == 0.0, float("inf"), largest + tl.log(total))
        tl.store(totals + tl.program_id(0).to(tl.int64) * tokens + t, kept, mask=t < tokens)
        values = _load(v, row, head, tokens, v_row, v_head, v_token, t, d, WIDTH)
        output = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        _store(o, output, row, head, tokens, o_row, o_head, o_token, t, d, WIDTH)

    @triton.jit
    def _backward(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        g,
        gq,
        gk,
        gv,
        totals,
        mask,
        q_row,
        q_head,
        q_token,
        k_row,
        k_head,
        k_token,
        v_row,
        v_head,
        v_token,
        g_row,
        g_head,
        g_token,
        gq_row,
        gq_head,
        gq_token,
        gk_row,
        gk_head,
        gk_token,
        gv_row,
        gv_head,
        gv_token,
        mask_row,
        mask_query,
        mask_key,
        heads,
        tokens,
        scale,
        WIDTH: tl.constexpr,
        T: tl.constexpr,
        D: tl.constexpr,
        CAUSAL: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        """Lead the gradient g of one head's output back to its queries, keys and values."""
        row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        t, d = tl.arange(0, T), tl.arange(0, D)
        queries = _load(q, row, head, tokens, q_row, q_head, q_token, t, d, WIDTH)
        keys = _load(k, row, head, tokens, k_row, k_head, k_token, t, d, WIDTH)
        scores = _scores(queries, keys, scale, mask, row, mask_row, mask_query, mask_key, tokens, t, CAUSAL, MASKED)
        kept = tl.load(totals + tl.program_id(0).to(tl.int64) * tokens + t, mask=t < tokens, other=float("inf"))
        weights = tl.exp(scores - kept[:, None])
        gradient = _load(g, row, head, tokens, g_row, g_head, g_token, t, d, WIDTH)
        # Stored at once: the fewer registers a program holds, the more programs run beside each other.
        to_values = tl.dot(tl.trans(weights.to(keys.dtype)), gradient, input_precision="ieee")
        _store(gv, to_values, row, head, tokens, gv_row, gv_head, gv_token, t, d, WIDTH)
        values = _load(v, row, head, tokens, v_row, v_head, v_token, t, d, WIDTH)
        to_weights = tl.dot(gradient, tl.trans(values), input_precision="ieee")
        to_scores = weights * (to_weights - tl.sum(weights * to_weights, 1)[:, None]) * scale
        to_scores = to_scores.to(keys.dtype)
        to_queries = tl.dot(to_scores, keys, input_precision="ieee")
        _store(gq, to_queries, row, head, tokens, gq_row, gq_head, gq_token, t, d, WIDTH)
        to_keys = tl.dot(tl.trans(to_scores), queries, input_precision="ieee")
        _store(gk, to_keys, row, head, tokens, gk_row, gk_head, gk_token, t, d, WIDTH)
