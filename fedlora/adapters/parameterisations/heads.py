"""Several heads beside a layer: dW = s sum over h of s_h B_h H_h A_h, B_h and A_h frozen, H_h and s_h trained.

That is s B R A with a block-diagonal R of the blocks s_h H_h. heads x r^2 numbers give dW a rank of heads x r; one
square matrix (:mod:`fedlora.adapters.parameterisations.sb`) of as many numbers gives a rank of sqrt(heads) x r.
"""

from __future__ import annotations

from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler
from pydantic import Field
from torch import nn

from fedlora.adapters.layers import AdapterLayer, FactoredLinear, adapter_dtype
from fedlora.adapters.parameterisations import LowRank
from fedlora.adapters.stacked import RowLayout, StackedLayer, row_pairs, stacked_product
from fedlora.arrays import Arrays
from fedlora.config import Config, Positive
from fedlora.errors import InputError
from fedlora.models import linear_shape
from fedlora.ranks import RankedOptions, Ranks
from fedlora.svd import TruncatedSVD


class HeadsSection(RankedOptions):
    """``[method]`` of a run whose layers have heads."""

    ranks: Ranks | None = Field(
        default=None,
        description="Rank of each client: method.rank times the number of heads that it holds, of all by default. "
        "A list in the clients' order, or a table by their names or numbers.",
    )
    heads: Positive = Field(default=4, description="Number of heads of a layer, each of rank r.")
    train_scales: bool = Field(
        default=True, description="Train a scale for each head beside its matrix; it is multiplied in before sending."
    )

    @property
    def possible_ranks(self) -> range:
        """Ranks of one head, of two, and so on to all."""
        return range(self.rank, self.heads * self.rank + 1, self.rank)

    @property
    def rank_rule(self) -> str:
        """What is one of :attr:`possible_ranks`, in words."""
        return f"multiple of method.rank = {self.rank} up to {self.heads * self.rank}, the rank of all heads"


class Heads(LowRank):
    """A block-diagonal matrix between two frozen factors. Arrays have an axis of heads where one is trained."""

    name = "heads"

    def shapes(self, out_features: int, in_features: int, rank: int, heads: int = 1) -> dict[str, tuple[int, ...]]:
        """A [h r, n], H [h, r, r], s [h] and B [m, h r]; rows of A and columns of B head after head."""
        width = heads * rank
        return {
            "heads_A": (width, in_features),
            "heads_H": (heads, rank, rank),
            "heads_s": (heads,),
            "heads_B": (out_features, width),
        }

    def shapes_at(self, adapter: AdapterLayer, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes for a client of the first rank / r heads, each of rank r."""
        blocks = adapter.get_submodule("heads_H").weight
        assert isinstance(blocks, torch.Tensor)
        own = blocks.shape[-1]
        return self.shapes(*linear_shape(adapter.base), own, rank // own)

    def layer(self, path: str, base: nn.Module, config: Config, layout: RowLayout) -> FactoredLinear:
        """Return the frozen layer with a branch; refuse more ranks than the layer has."""
        method, (m, n) = config.method, linear_shape(base)
        assert isinstance(method, HeadsSection)
        if method.heads * method.rank > min(m, n):
            remedy = f"heads of rank {method.rank} are above the size of {path} ({m} x {n}); use fewer, or a lower rank"
            raise InputError("method.heads", method.heads, remedy)
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        dtype, device = adapter_dtype(base), weight.device
        factors: dict[str, Any] = dict(self.shapes(m, n, method.rank, method.heads))
        factors["heads_H"] = StackedBlocks(method.heads, method.rank, layout, dtype, device)
        if method.train_scales:
            factors["heads_s"] = StackedScales(method.heads, layout, dtype, device)
        else:
            del factors["heads_s"]
        return FactoredLinear(base, factors, config.scaling(), layout, method.dropout)

    def to_lora(self, factors: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
        """Fold the blocks into B: B R A = (B R) A is a plain LoRA of rank h r."""
        blocks = scaled(factors["heads_H"], factors.get("heads_s"))
        return factors["heads_A"], factors["heads_B"] @ torch.block_diag(*blocks)


def scaled(blocks: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Return s_h H_h [h, r, r]; H_h where there are no scales [h]."""
    return blocks if scales is None else scales[:, None, None] * blocks


class StackedBlocks(StackedLayer):
    """A block-diagonal linear layer with a client axis: every head's part of the input meets its own matrix.

    Attributes
    ----------
    weight : Parameter [K, h, r, r]
    """

    def __init__(
        self, heads: int, rank: int, layout: RowLayout, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__(layout)
        self.weight = nn.Parameter(torch.zeros(1, heads, rank, rank, dtype=dtype, device=device), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, ..., h r] to [N, ..., h r], each row with its own client's blocks."""
        self.layout.check_rows(len(x), self.name)
        clients, heads, rank, _ = self.weight.shape
        # One product of the whole matrix: as long as it is small, that costs less than a product for every block.
        whole = torch.diag_embed(self.weight.permute(0, 2, 3, 1), dim1=1, dim2=3)
        return stacked_product(x, whole.reshape(clients, heads * rank, heads * rank).to(x.dtype), self.layout)

    @staticmethod
    def samples(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Return each row's gradient [N, h, r, r] from inputs and output gradients [N, T, h, r]: g_h^T x_h."""
        return torch.einsum("nthi,nthj->nhij", g, x)


class StackedScales(StackedLayer):
    """A factor for each head, with a client axis.

    Attributes
    ----------
    weight : Parameter [K, h]
    """

    def __init__(
        self, heads: int, layout: RowLayout, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__(layout)
        self.weight = nn.Parameter(torch.zeros(1, heads, dtype=dtype, device=device), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply every head's part of x [N, ..., h r] by its client's factor."""
        self.layout.check_rows(len(x), self.name)
        wide = self.weight.to(x.dtype).repeat_interleave(x.shape[-1] // self.weight.shape[1], 1)
        return x * self.layout.by_row(wide, x)

    @staticmethod
    def samples(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Return each row's gradient [N, h] from inputs and output gradients [N, T, h, r]: the sum of g_h times x_h."""
        return (g * x).sum((1, 3))


@register_grad_sampler([StackedBlocks, StackedScales])
def heads_grad_sample(
    layer: StackedBlocks | StackedScales, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """Per-example gradients for Opacus, [N, ...] on a weight [K, ...].

    Raises
    ------
    GuardError
        If there are other rows than the layout says.
    """
    if not layer.weight.requires_grad:
        return {}
    x, g = (each.unflatten(-1, (layer.weight.shape[1], -1)) for each in row_pairs(layer, activations[0], backprops))
    return {layer.weight: layer.samples(x.to(layer.weight.dtype), g.to(layer.weight.dtype))}


def factors_from_pairs(pairs: TruncatedSVD, heads: int) -> Arrays:
    """Start without data: the leading h r singular vectors of W0 [m, n], dealt to the heads in turn; H = 0, s = 1.

    Dealt in turn, every head has a share of the large singular values. One head has the square matrix' own start.
    """
    rank = len(pairs.s) // heads
    order = torch.arange(heads * rank).reshape(rank, heads).T.reshape(-1)
    return _started(pairs.vh[order].contiguous(), pairs.u[:, order].contiguous(), rank, heads)


def orthogonal_factors(
    out_features: int, in_features: int, rank: int, heads: int, generator: torch.Generator, dtype: torch.dtype
) -> Arrays:
    """Random start: rows of A and columns of B are orthonormal, those of different heads too; H = 0, s = 1.

    Parameters
    ----------
    out_features, in_features, rank, heads : int
    generator : torch.Generator
        Successive calls give every layer a draw of its own.
    dtype : torch.dtype
    """
    width = heads * rank
    a, b = (
        torch.linalg.qr(torch.randn(size, width, generator=generator, dtype=torch.float64))[0].to(dtype)
        for size in (in_features, out_features)
    )
    return _started(a.T.contiguous(), b.contiguous(), rank, heads)


def _started(a: torch.Tensor, b: torch.Tensor, rank: int, heads: int) -> Arrays:
    return {
        "heads_A": a,
        "heads_H": torch.zeros(heads, rank, rank, dtype=a.dtype),
        "heads_s": torch.ones(heads, dtype=a.dtype),
        "heads_B": b,
    }
