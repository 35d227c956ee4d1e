"""What takes a linear layer's place: the frozen layer, with what is trained beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fedlora.adapters.own_rows import OwnRows
from fedlora.adapters.stacked import ClientDropout, RowLayout, StackedLayer, StackedLinear
from fedlora.kernels.products import handed_on, shared_product, shares
from fedlora.models import dense_weight


class AdapterLayer(nn.Module):
    """A frozen linear layer and what is trained beside it; a subclass computes in :meth:`added` what that adds.

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
        What the run added to the frozen weight, in float32 or float64. The weight itself stays as it was loaded.
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
        """The frozen layer's weight: T5 reads its dtype. Code that multiplies by it bypasses the factors."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen layer's bias."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, T, n] to [N, T, m].

        Some models pass one x [1, T, n] for the whole batch; the result then holds a row for each example
        (:class:`~fedlora.adapters.own_rows.OwnRows`).
        """
        y, rows = self.frozen(x), self.layout.own_rows(x)
        if rows:
            own = y + self.added(x.expand(rows, *x.shape[1:]), y.expand(rows, *y.shape[1:]))
            return OwnRows.of(own.unsqueeze(1))
        return y + self.added(x, y)

    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output without the factors: W0 x + bias + residual x."""
        y: torch.Tensor = self.base(x)
        if self.residual is None:
            return y
        # In the residual's own precision: a half-precision weight would swallow it.
        return y + nn.functional.linear(x.to(self.residual.dtype), self.residual).to(y.dtype)

    def added(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return what the factors add to the frozen layer's output y [N, T, m] for the input x [N, T, n]."""
        raise NotImplementedError

    def drawn_scale(self, factor: str) -> float:
        """Return the scale of a factor's random values in :meth:`~fedlora.adapters.AdaptedModel.drawn`."""
        return 1.0


class FactoredLinear(AdapterLayer):
    """A frozen linear layer plus a product of small factors: y = (W0 + residual) x + s F_k ... F_1 x.

    Parameters
    ----------
    base : torch.nn.Linear or transformers Conv1D
    factors : mapping of str to (int, int) or StackedLayer
        By name the shape (rows, columns) of a matrix, or another layer, in the order in which the input meets them.
    scaling : float
        s = alpha / rank.
    layout : RowLayout
    dropout : float
        On the branch's input, as in PEFT.
    """

    def __init__(
        self,
        base: nn.Module,
        factors: Mapping[str, Sequence[int] | StackedLayer],
        scaling: float,
        layout: RowLayout,
        dropout: float = 0.0,
    ) -> None:
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        dtype, device = adapter_dtype(base), weight.device
        stacked: dict[str, StackedLayer] = {}
        for name, factor in factors.items():
            if isinstance(factor, StackedLayer):
                stacked[name] = factor
            else:
                rows, columns = factor
                stacked[name] = StackedLinear(columns, rows, layout, dtype=dtype, device=device)
        super().__init__(base, stacked, layout)
        self.scaling = scaling
        self.dropout = ClientDropout(dropout, layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, T, n] to [N, T, m]; on a GPU sums are taken inside the products, which saves passes over memory."""
        if not x.is_cuda or self.layout.own_rows(x):
            return super().forward(x)
        y = self.frozen(x)
        return self._after_first(self._first(x), y)

    def added(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the branch's output, s F_k ... F_1 x."""
        return self.branch(x)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the factors add to the frozen layer's output: s F_k ... F_1 x."""
        return self._after_first(self._first(x))

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first factor's output, for x as the frozen layer handed it on."""
        first = getattr(self, self.factors[0])
        if not isinstance(first, StackedLinear) or self.dropout.p:
            narrow: torch.Tensor = first(self.dropout(x))
            return narrow
        if len(first.weight) == 1 and first.bias is None:
            weight = first.weight[0].to(x.dtype)
            if shares(x, weight):
                return shared_product(x, weight)
        narrow = first(handed_on(x))
        return narrow

    def _after_first(self, branch: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """Apply scale and the factors after the first; add the result onto a tensor, if one is given."""
        if self.scaling != 1:
            branch = self.scaling * branch  # here it has the rank's width, not the layer's
        others = [getattr(self, name) for name in self.factors[1:]]
        if onto is not None and others and isinstance(others[-1], StackedLinear):
            last = others.pop()
            for layer in others:
                branch = layer(branch)
            whole: torch.Tensor = last(branch, onto=onto)
            return whole
        for layer in others:
            branch = layer(branch)
        return branch if onto is None else onto + branch

    def drawn_scale(self, factor: str) -> float:
        """Scale the last factor so that the product's norm is about a tenth of the frozen weight's."""
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
