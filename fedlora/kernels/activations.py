"""Activations and gated feed-forward blocks on a GPU, each activation in one kernel forward and one backward.

PyTorch reads and writes all activations more often, and its exact GELU computes longer than it reads and writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings Triton where it brings CUDA
    triton = None

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""What is in the feed-forward block of Llama and its many relatives."""

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
}

KINDS = {name: number for number, name in enumerate(ACTIVATIONS)}
"""By which a kernel knows an activation."""

BLOCK = 1024
"""Numbers that a program of a kernel computes."""


def use_activation_kernels(model: nn.Module) -> None:
    """Replace a model's activations and gated feed-forward blocks by modules that compute the same in fewer kernels.

    What a module computes is tried, since names do not tell; a block's once for each class.

    Parameters
    ----------
    model : torch.nn.Module
        On a GPU. Where the kernels do not carry the tensors, the new modules leave the work to PyTorch.
    """
    if triton is None:
        return
    known: dict[type, str | None] = {}
    for path, module in list(model.named_modules()):
        if _looks_gated(module):
            if type(module) not in known:
                known[type(module)] = _gate_of(module)
            if name := known[type(module)]:
                model.set_submodule(path, GatedFeedForward(module, name))
        elif _looks_elementwise(module) and (name := _activation_of(module)) and name != "silu":
            model.set_submodule(path, Activation(module, name))  # PyTorch's SiLU is one kernel, as fast as memory


def _looks_elementwise(module: nn.Module) -> bool:
    known = type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation")
    return known and not [*module.parameters(), *module.children()]


@torch.no_grad()
def _activation_of(act: Callable[[torch.Tensor], torch.Tensor], device: torch.device | None = None) -> str | None:
    """Return the name of an elementwise function; None for one that has no kernel."""
    near, far = torch.linspace(-6, 6, 101, dtype=torch.float64), torch.tensor([-1e3, -30.0, 30.0, 1e3]).double()
    grid = torch.cat([near, far]).to(device)  # far from zero some are clipped
    try:
        found = act(grid)
    except Exception:  # of any module's code
        return None
    if not isinstance(found, torch.Tensor) or found.shape != grid.shape:
        return None
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(found, known(grid), atol=1e-9)), None)


def _looks_gated(module: nn.Module) -> bool:
    return {name for name, _ in module.named_children()} == set(GATED)


@torch.no_grad()
def _gate_of(module: Any) -> str | None:
    """Return the activation of a block that computes down(act(gate(x)) up(x)) and no more; None for other blocks."""
    act, gate, up, down = module.act_fn, module.gate_proj, module.up_proj, module.down_proj
    device, dtype = down.weight.device, down.weight.dtype
    name = _activation_of(act, device)
    if name is None or not isinstance(up, nn.Linear) or dtype == torch.int8:  # whose layers change at their first pass
        return None
    dtype = dtype if dtype.is_floating_point else torch.bfloat16  # a weight of 4 bits takes any
    x = torch.linspace(-1, 1, up.in_features, dtype=dtype, device=device)[None, None]
    found, expected = module(x), down(act(gate(x)) * up(x))
    return name if torch.equal(found, expected) else None


class GatedFeedForward(nn.Module):
    """A feed-forward block, down(act(gate(x)) up(x)), whose gate is one kernel forward and one backward.

    Parameters
    ----------
    block : torch.nn.Module
        Its ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn`` are taken over.
    activation : str
        Of :data:`ACTIVATIONS`.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def __init__(self, block: nn.Module, activation: str) -> None:
        super().__init__()
        for name in GATED:
            self.add_module(name, block.get_submodule(name))
        self.activation = activation
        self.train(block.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., n] to [..., n]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = gated(gate, up, self.activation) if carries(gate, up) else self.act_fn(gate) * up
        outputs: torch.Tensor = self.down_proj(inner)
        return outputs


class Activation(nn.Module):
    """An activation in one kernel forward and one backward.

    Parameters
    ----------
    stock : torch.nn.Module
        What it computes, for tensors that the kernels do not carry.
    activation : str
        Of :data:`ACTIVATIONS`.
    """

    def __init__(self, stock: nn.Module, activation: str) -> None:
        super().__init__()
        self.stock, self.activation = stock, activation
        self.train(stock.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x elementwise."""
        if carries(x) and x.is_contiguous():
            return activated(x, self.activation)
        outputs: torch.Tensor = self.stock(x)
        return outputs


def carries(*tensors: torch.Tensor) -> bool:
    """Whether elementwise kernels take these tensors; torch.compile fuses what they would do by itself."""
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and first.dtype in (torch.bfloat16, torch.float16)
        and all(type(x) is torch.Tensor and x.is_cuda and x.dtype == first.dtype and x.numel() for x in tensors)
    )


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return act(gate) up, elementwise.

    Parameters
    ----------
    gate, up : Tensor
        Of one shape.
    activation : str
        Of :data:`ACTIVATIONS`.
    """
    product: torch.Tensor = _Gated.apply(gate, up, activation)
    return product


def activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Return act(x), elementwise.

    Parameters
    ----------
    x : Tensor
        Contiguous.
    activation : str
        Of :data:`ACTIVATIONS`.
    """
    outputs: torch.Tensor = _Activated.apply(x, activation)
    return outputs


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, activation: str) -> torch.Tensor:
        outputs, size = torch.empty_like(x), x.numel()
        with torch.cuda.device_of(x):
            _activation_forward[triton.cdiv(size, BLOCK),](x, outputs, size, KIND=KINDS[activation], BLOCK=BLOCK)
        ctx.save_for_backward(x)
        ctx.activation = activation
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), gradient = ctx.saved_tensors, gradients[0].contiguous()
        to_x, size, kind = torch.empty_like(x), x.numel(), KINDS[ctx.activation]
        with torch.cuda.device_of(x):
            _activation_backward[triton.cdiv(size, BLOCK),](x, gradient, to_x, size, KIND=kind, BLOCK=BLOCK)
        return to_x, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        product = torch.empty_like(gate)
        size = gate.numel()
        with torch.cuda.device_of(gate):
            _gate_forward[triton.cdiv(size, BLOCK),](gate, up, product, size, KIND=KINDS[activation], BLOCK=BLOCK)
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        to_gate, to_up, size = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        tensors = gate, up, gradient, to_gate, to_up
        with torch.cuda.device_of(gate):
            _gate_backward[triton.cdiv(size, BLOCK),](*tensors, size, KIND=KINDS[ctx.activation], BLOCK=BLOCK)
        return to_gate, to_up, None


if triton is not None:

    @triton.jit
    def _activation(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
        """Return act(x) and its derivative."""
        if KIND == 0:  # SiLU
            share = tl.sigmoid(x)
            return x * share, share * (1.0 + x * (1.0 - share))
        elif KIND == 1:  # GELU: x Phi(x) of the normal distribution, its tail by Abramowitz and Stegun 7.1.26
            # One instruction each for the reciprocal and the power: a division and exp would take longer than memory.
            t = 1.0 + 0.23164189 * tl.abs(x)  # 0.3275911 / sqrt(2)
            t = tl.rsqrt(t * t)
            density = tl.exp2(-0.7213475204444817 * x * x)  # exp(-x^2 / 2)
            tail = 1.061405429 * t - 1.453152027
            tail = ((tail * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
            tail = 0.5 * tail * t * density
            share = tl.where(x < 0.0, tail, 1.0 - tail)
            return x * share, share + 0.3989422804014327 * x * density
        else:  # GELU by tanh u = 2 sigmoid(2 u) - 1, with u = sqrt(2 / pi) (x + 0.044715 x^3)
            share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
            return x * share, share + x * share * (1.0 - share) * slope

    @triton.jit
    def _activation_forward(x, y, size, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        value, _ = _activation(tl.load(x + places, mask=inside, other=0.0).to(tl.float32), KIND)
        tl.store(y + places, value.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _activation_backward(x, gradient, to_x, size, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        _, slope = _activation(tl.load(x + places, mask=inside, other=0.0).to(tl.float32), KIND)
        g = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(to_x + places, (g * slope).to(to_x.dtype.element_ty), mask=inside)

    @triton.jit
    def _gate_forward(gate, up, product, size, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        value, _ = _activation(tl.load(gate + places, mask=inside, other=0.0).to(tl.float32), KIND)
        other = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(product + places, (value * other).to(product.dtype.element_ty), mask=inside)

    @triton.jit
    def _gate_backward(gate, up, gradient, to_gate, to_up, size, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        value, slope = _activation(tl.load(gate + places, mask=inside, other=0.0).to(tl.float32), KIND)
        other = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(to_gate + places, (g * other * slope).to(to_gate.dtype.element_ty), mask=inside)
        tl.store(to_up + places, (g * value).to(to_up.dtype.element_ty), mask=inside)
