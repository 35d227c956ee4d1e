"""What takes a linear layer's place: the frozen layer, with what is trained beside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import nn

from fedlora.adapters.own_rows import OwnRows
from fedlora.adapters.stacked import ClientDropout, RowLayout, StackedLayer, StackedLinear
from fedlora.models import dense_weight


class AdapterLayer(nn.Module):
    """A frozen linear layer and what is trained beside it; a subclass says in :meth:`added` what that adds.

    Parameters
    ----------
    base : torch.nn.Linear or transformers Conv1D
        The frozen layer, of m outputs and n inputs.
    factors : mapping of str to StackedLayer
        What is trained, by the last part of its array's name.
    layout : RowLayout

    Attributes
    ----------
    factors : tuple of str
        The names; the layers are attributes of these names.
    residual : Tensor [m, n] or None
        What was added to the frozen weight since, in float32 or wider; never written into the weight itself.
    """

    def __init__(self, base: nn.Module, factors: Mapping[str, StackedLayer], layout: RowLayout) -> None:
        super().__init__()
        self.base, self.layout = base, layout
        self.residual: torch.Tensor | None = None
        self.factors = tuple(factors)
        for name, layer in factors.items():
            self.add_module(name, layer)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen layer's, of which others ask the dtype (as T5); who computes with it goes past the factors."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen layer's."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, T, n] to [N, T, m]; an x [1, T, n] that the batch shares, to each example's own."""
        y, rows = self.frozen(x), self.layout.own_rows(x)
        if rows:
            own = y + self.added(x.expand(rows, *x.shape[1:]), y.expand(rows, *y.shape[1:]))
            return OwnRows.of(own.unsqueeze(1))
        return y + self.added(x, y)

    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is not trained: W0 x, and the residual's part where there is one."""
        y: torch.Tensor = self.base(x)
        if self.residual is None:
            return y
        # In the residual's own precision: a half-precision weight would swallow it.
        return y + nn.functional.linear(x.to(self.residual.dtype), self.residual).to(y.dtype)

    @abstractmethod
    def added(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return what the factors add to the frozen layer's output y [N, T, m] for the input x [N, T, n]."""

    def drawn_scale(self, factor: str) -> float:
        """By how much :meth:`~fedlora.adapters.AdaptedModel.drawn` scales a factor."""
        return 1.0


class FactoredLinear(AdapterLayer):
    """A frozen linear layer plus a product of small factors: y = (W0 + residual) x + s F_k ... F_1 x.

    Parameters
    ----------
    base : torch.nn.Linear or transformers Conv1D
    factors : mapping of str to (int, int)
        Name to shape (rows, columns), in the order in which the input meets them.
    scaling : float
        s = alpha / rank.
    layout : RowLayout
    dropout : float
        On the branch's input, as in PEFT.
    """

    def __init__(
        self,
        base: nn.Module,
        factors: Mapping[str, tuple[int, int]],
        scaling: float,
        layout: RowLayout,
        dropout: float = 0.0,
    ) -> None:
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        dtype, device = adapter_dtype(base), weight.device
        stacked = {
            name: StackedLinear(columns, rows, layout, dtype=dtype, device=device)
            for name, (rows, columns) in factors.items()
        }
        super().__init__(base, stacked, layout)
        self.scaling = scaling
        self.dropout = ClientDropout(dropout, layout)

    def added(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The branch."""
        return self.branch(x)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the factors add to the frozen layer's output: s F_k ... F_1 x."""
        first, *others = self.factors
        branch = getattr(self, first)(self.dropout(x))
        if self.scaling != 1:
            branch = self.scaling * branch  # here it has the rank's width, not the layer's
        for name in others:
            branch = getattr(self, name)(branch)
        return branch

    def drawn_scale(self, factor: str) -> float:
        """The last factor's makes the product a tenth of the frozen weight."""
        if factor != self.factors[-1]:
            return 1.0
        weight = dense_weight(self.base)
        rms = float(weight.norm()) / weight.numel() ** 0.5
        return float(0.1 * rms * weight.shape[1] ** 0.5 / self.scaling)


def adapter_dtype(base: nn.Module) -> torch.dtype:
    """Return the dtype of what is trained beside a layer.

    A half-precision base keeps full-precision adapters: their updates would be lost in bf16's 8 bits.
    """
    weight: torch.Tensor = base.weight  # type: ignore[assignment]
    return weight.dtype if weight.dtype == torch.float64 else torch.float32
