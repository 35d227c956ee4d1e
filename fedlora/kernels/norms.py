"""Layer norms and RMS norms on a GPU, each in one kernel forward and one backward.

PyTorch's kernels give a row to several warps, which wait for each other, and the RMS norms of transformers' models are
many kernels. Here a row of up to 1,024 numbers is one warp's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedlora.kernels.activations import carries

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings Triton where it brings CUDA
    triton = None

WIDEST = 16384
"""Numbers of a row at most: a program holds a whole one."""

WARP = 1024
"""Numbers of a row for each warp."""


def use_norm_kernels(model: nn.Module) -> None:
    """Replace a model's norms by modules that compute the same in one kernel each.

    What an RMS norm of a model's own code computes is tried, once for each class, since names do not tell.

    Parameters
    ----------
    model : torch.nn.Module
        Loaded. Where the kernels do not carry the tensors, the new modules leave the work to PyTorch.
    """
    known: dict[type, bool] = {}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    for path, module in list(model.named_modules()):
        if type(module) is nn.LayerNorm and module.weight is not None and module.weight.dim() == 1:
            norm = LayerNorm(module.normalized_shape, module.eps, device="meta")
            model.set_submodule(path, _taken_over(norm, module))
        # A weight that was left in float32 would widen what the next layers get.
        elif _looks_like_rms_norm(module) and module.weight.dtype == dtype:
            if type(module) not in known:
                known[type(module)] = _is_rms_norm(module)
            if known[type(module)]:
                rms = RMSNorm(module.weight.numel(), _epsilon(module), device="meta")
                model.set_submodule(path, _taken_over(rms, module))


def _taken_over(norm: nn.LayerNorm | nn.RMSNorm, module: Any) -> nn.Module:
    norm.weight = module.weight
    if isinstance(norm, nn.LayerNorm):
        norm.bias = module.bias
    return norm.train(module.training)


def _looks_like_rms_norm(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return names == ["weight"] and module.weight.dim() == 1 and isinstance(_epsilon(module), float)  # type: ignore[operator]


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _is_rms_norm(module: Any) -> bool:
    """Whether a module computes weight x / sqrt(mean x^2 + epsilon); Gemma's weight has one added to it."""
    size, device = len(module.weight), module.weight.device
    x, weight = torch.linspace(-3, 2, 2 * size, device=device).view(2, size), torch.linspace(-1, 2, size, device=device)
    try:
        found = torch.func.functional_call(module, {"weight": weight}, (x,))
    except (TypeError, ValueError, RuntimeError):
        return False
    expected = functional.rms_norm(x, (size,), weight, _epsilon(module))
    return isinstance(found, torch.Tensor) and found.shape == x.shape and bool(torch.allclose(found, expected))


class LayerNorm(nn.LayerNorm):
    """PyTorch's, by the kernels where they carry the tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., n] to (x - mean) / sqrt(variance + eps) weight + bias."""
        if _carries(self, x):
            return normed(x, self.weight, self.bias, self.eps, centred=True)
        return super().forward(x)


class RMSNorm(nn.RMSNorm):
    """PyTorch's, by the kernels where they carry the tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., n] to x / sqrt(mean x^2 + eps) weight."""
        if _carries(self, x):
            assert self.eps is not None
            return normed(x, self.weight, None, self.eps, centred=False)
        return super().forward(x)


def _carries(norm: nn.Module, x: torch.Tensor) -> bool:
    """Whether the kernels take a norm of these numbers: frozen weights, rows that lie side by side."""
    weights = list(norm.parameters())
    fit = not any(w.requires_grad or w.dtype != x.dtype or w.device != x.device for w in weights)
    short = x.shape[-1] == weights[0].numel() <= WIDEST
    return triton is not None and fit and short and carries(x) and x.is_contiguous()


def normed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float, *, centred: bool
) -> torch.Tensor:
    """Return a norm of each row, in one kernel.

    Parameters
    ----------
    x : Tensor [..., n]
        Contiguous.
    weight : Tensor [n]
        Frozen, as is the bias: neither gets a gradient.
    bias : Tensor [n], optional
    epsilon : float
        Added to the variance, or to the mean square.
    centred : bool
        Whether the mean is subtracted first, as a layer norm does and an RMS norm does not.

    Returns
    -------
    Tensor [..., n]
        Computed in float32, and rounded once.

    Notes
    -----
    Ba et al., arXiv 1607.06450, and Zhang and Sennrich, arXiv 1910.07467.
    """
    outputs: torch.Tensor = _Normed.apply(x, weight, bias, epsilon, centred)
    return outputs


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float, centred: bool
    ) -> torch.Tensor:
        size = x.shape[-1]
        rows, y = x.numel() // size, torch.empty_like(x)
        kept = x.new_empty(2, rows, dtype=torch.float32)  # mean and scale of each row
        given = weight if bias is None else bias
        with torch.cuda.device_of(x):
            _norm_forward[rows,](
                x, weight, given, y, *kept, size, epsilon, CENTRED=centred, BIAS=bias is not None, **_shape(size)
            )
        ctx.save_for_backward(x, weight, kept)
        ctx.centred = centred
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight, kept), gradient = ctx.saved_tensors, gradients[0].contiguous()
        size, to_x = x.shape[-1], torch.empty_like(x)
        with torch.cuda.device_of(x):
            _norm_backward[x.numel() // size,](
                x, weight, gradient, to_x, *kept, size, CENTRED=ctx.centred, **_shape(size)
            )
        return to_x, None, None, None, None


def _shape(size: int) -> dict[str, int]:
    """Return what a program's shape is, for rows of so many numbers."""
    wide = triton.next_power_of_2(size)
    return {"SIZE": wide, "num_warps": min(16, max(1, wide // WARP))}


if triton is not None:

    @triton.jit
    def _norm_forward(  # type: ignore[no-untyped-def]
        x, weight, bias, y, means, scales, size, epsilon, SIZE: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr
    ):
        """Norm one row, and keep its mean and scale."""
        row, d = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
        inside = d < size
        values = tl.load(x + row * size + d, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            mean = tl.sum(values, 0) / size
            tl.store(means + row, mean)
            values = tl.where(inside, values - mean, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / size + epsilon)
        tl.store(scales + row, scale)
        outputs = values * scale * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            outputs += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * size + d, outputs.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm_backward(  # type: ignore[no-untyped-def]
        x, weight, gradient, to_x, means, scales, size, SIZE: tl.constexpr, CENTRED: tl.constexpr
    ):
        """Lead one row's gradient back: scale (g w - mean of g w - z mean of g w z), with the normed row z."""
        row, d = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
        inside = d < size
        g = tl.load(gradient + row * size + d, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        z, scale = tl.load(x + row * size + d, mask=inside, other=0.0).to(tl.float32), tl.load(scales + row)
        if CENTRED:
            z -= tl.load(means + row)
        z *= scale
        # Past a row's end g is zero, whatever z is.
        back = g - z * (tl.sum(g * z, 0) / size)
        if CENTRED:
            back -= tl.sum(g, 0) / size
        tl.store(to_x + row * size + d, (back * scale).to(to_x.dtype.element_ty), mask=inside)
