"""The one layer that is trained: a linear layer with a client axis.

K clients that share a frozen base model train in one pass: their batches are concatenated, the base runs once over all
rows, and every row meets the weights of its own client. The loss is a sum of the clients' own losses, so their
gradients never mix. With K = 1 the layer is ``torch.nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import register_grad_sampler
from torch import nn
from torch.nn import functional

from fedlora import entropy
from fedlora.errors import GuardError


class RowLayout:
    """Which rows of the current batch belong to which client; one plain object shared by all stacked layers of a model.

    Rows are ordered by client. It is no module and holds no buffer, since Opacus refuses buffers on trainable modules.

    Attributes
    ----------
    counts : tuple of int
        Number of rows of each of the K clients; a client may have none.
    lengths : tuple of int
        Longest sequence among each client's rows, in tokens.
    per_example : bool
        True while per-example gradients are taken: then the weights' summed gradients, which nobody reads, are skipped.
    dropout_generators : list of torch.Generator or None, optional
        One generator a client, for dropout masks that do not depend on how clients are packed; None for the operating
        system's entropy.
    fill_secret : callable (Tensor)
        Fills a tensor with numbers of [0, 1) of the operating system's entropy.
    """

    def __init__(self) -> None:
        self.per_example = False
        self.fill_secret: Callable[[torch.Tensor], Any] = entropy.fill_uniform
        self.dropout_generators: list[torch.Generator | None] | None = None
        self.set_rows([1])

    def set_rows(self, counts: Sequence[int], lengths: Sequence[int] | None = None) -> None:
        """Announce the next batch: ``counts[k]`` rows of client k, at most ``lengths[k]`` tokens long."""
        self.counts = tuple(int(count) for count in counts)
        self.lengths = tuple(lengths) if lengths is not None else (0,) * len(self.counts)
        self.equal = len(set(self.counts)) == 1
        self._on_devices: dict[tuple[str, torch.device], torch.Tensor] = {}

    def sizes(self, device: torch.device) -> torch.Tensor:
        """Return the clients' numbers of rows [K], on a device."""
        return self._on("sizes", lambda: self.counts, device)

    def clients(self, device: torch.device) -> torch.Tensor:
        """Return each row's client [N], on a device."""
        return self._on("clients", lambda: np.repeat(np.arange(len(self.counts)), self.counts), device)

    def _on(self, name: str, make: Callable[[], Any], device: torch.device) -> torch.Tensor:
        """Return numbers of the batch, which are made and copied once for each device."""
        key = name, device
        if key not in self._on_devices:
            # A blocking copy would wait for all work that is queued on a GPU.
            self._on_devices[key] = torch.as_tensor(make()).to(device, non_blocking=True)
        return self._on_devices[key]

    def check_rows(self, rows: int, layer: str) -> None:
        """Refuse rows that are not those announced, where it matters whose a row is.

        Raises
        ------
        GuardError
            Naming the layer.
        """
        if (self.per_example or len(self.counts) > 1) and rows != sum(self.counts):
            raise GuardError(
                f"{layer} sees {rows} rows of a batch of {sum(self.counts)}, so it is unknown whose they are; "
                "leave the layer out of method.target_modules"
            )

    def own_rows(self, x: torch.Tensor) -> int:
        """Return of how many examples x must become each one's own: N where N of them share x [1, ...], else 0."""
        matters = self.per_example or len(self.counts) > 1 or self.dropout_generators is not None
        rows = sum(self.counts)
        return rows if matters and len(x) == 1 and rows > 1 else 0

    @contextmanager
    def dropout(self, generators: list[torch.Generator | None]) -> Iterator[None]:
        """Draw dropout masks from the clients' own generators; without a list of them there is no dropout."""
        self.dropout_generators = generators
        try:
            yield
        finally:
            self.dropout_generators = None

    def by_row(self, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Give every row of x [N, ..., n] its own client's vector of values [K, m]: [N, ..., m], to be broadcast."""
        if self.equal or len(values) == 1:
            values = values.repeat_interleave(len(x) // len(values), 0)
        else:
            values = values[self.clients(values.device)]
        return values.reshape(len(x), *(1,) * (x.dim() - 2), -1)

    def by_client(self, values: torch.Tensor) -> torch.Tensor:
        """Gather rows [N, T, d] by client, [K, longest * T, d]; clients with fewer rows than the longest get zeros."""
        clients, _, width = len(self.counts), *values.shape[1:]
        if not self.equal:
            places = self._on("padded", self._padded, values.device)
            values = torch.cat([values, values.new_zeros(1, *values.shape[1:])])[places]
        return values.reshape(clients, -1, width)

    def _padded(self) -> np.ndarray:
        """Return the rows of each client one client after the other, as many for each as the longest has."""
        longest = max(self.counts)
        starts = np.cumsum([0, *self.counts[:-1]])
        places = starts[:, None] + np.arange(longest)
        # The place after the last holds zeros.
        places[np.arange(longest) >= np.array(self.counts)[:, None]] = sum(self.counts)
        return places.ravel()

    def sum_rows(self, values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Sum rows by client, each row times its weight.

        Parameters
        ----------
        values : Tensor [N, ...]
        weights : Tensor [N], optional

        Returns
        -------
        Tensor [K, ...]
            The order of summation is fixed, on the GPU too, which an index-add would not give. Half precision is summed
            in float32.
        """
        clients = len(self.counts)
        if self.equal:
            rows = values.reshape(clients, -1, *values.shape[1:])
            if weights is None:
                return rows.sum(1)
            flat = rows.reshape(clients, rows.shape[1], -1)
            return torch.bmm(weights.reshape(clients, 1, -1), flat).reshape(clients, *values.shape[1:])
        flat = values.reshape(len(values), -1)
        if weights is not None:
            flat = flat * weights[:, None]
        # segment_reduce adds in the dtype that it is given: in bf16 a sum soon stops growing.
        wide = flat if flat.dtype == torch.float64 else flat.float()
        summed = torch.segment_reduce(wide, "sum", lengths=self.sizes(flat.device), axis=0, unsafe=True)
        return summed.to(flat.dtype).reshape(clients, *values.shape[1:])


@dataclass
class RowProducts:
    """Per-example gradients gs_n = g_n^T x_n [N, out, in] that are not multiplied out.

    Their norms are "ghost norms": |g_n^T x_n|_F^2 = sum over t, t' of (g_t . g_t') (x_t . x_t') (Li et al.,
    arXiv 2110.05679), and their weighted sums are one product a client.

    Attributes
    ----------
    g : Tensor [N, T, out]
    x : Tensor [N, T, in]
    """

    g: torch.Tensor
    x: torch.Tensor

    def __len__(self) -> int:
        return len(self.g)

    def __add__(self, other: RowProducts) -> RowProducts:
        """Sum of two: their positions side by side."""
        return RowProducts(torch.cat([self.g, other.g], 1), torch.cat([self.x, other.x], 1))

    def norms(self) -> torch.Tensor:
        """Frobenius norm of every row's gradient [N]; where a row's positions nearly cancel, an upper bound of it.

        Rounding errs by some eps times the square of sum over t of |g_t| |x_t|. Below a thousand of that the norm could
        come out as next to nothing, and its gradient would pass unclipped.
        """
        grams = torch.bmm(self.g, self.g.transpose(1, 2)) * torch.bmm(self.x, self.x.transpose(1, 2))
        largest = grams.diagonal(dim1=1, dim2=2).sqrt().sum(1).square()
        return torch.maximum(grams.sum((1, 2)), 1000 * torch.finfo(grams.dtype).eps * largest).sqrt()

    def sum_rows(self, layout: RowLayout, weights: torch.Tensor) -> torch.Tensor:
        """Sum the gradients by client [K, out, in], each times its row's weight [N]."""
        g = layout.by_client(self.g * weights[:, None, None])
        return torch.bmm(g.transpose(1, 2), layout.by_client(self.x))


def ghost_norms_pay(tokens: int, out_features: int, in_features: int) -> bool:
    """Say whether :class:`RowProducts` move fewer numbers through memory than per-example gradients do.

    Parameters
    ----------
    tokens : int
        T, positions of a row.
    out_features, in_features : int

    Notes
    -----
    A gradient of out x in numbers is written once and read twice, for its norm and for the sum. Ghost norms write and
    read two T x T matrices, and read g and x once more for the norm and once for the sum.
    """
    return 4 * tokens**2 + 2 * tokens * (out_features + in_features) < 3 * out_features * in_features


class _StackedProduct(torch.autograd.Function):
    """y_n = x_n W_{c(n)}^T (+ onto_n) for every row n, with c(n) the row's client."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, layout: RowLayout, onto: torch.Tensor | None
    ) -> torch.Tensor:
        clients, out_features, in_features = weight.shape
        if clients != len(layout.counts):
            raise ValueError(f"the weights are those of {clients} clients, the rows those of {len(layout.counts)}")
        groups, own = (clients, weight) if layout.equal else (len(x), weight[layout.clients(x.device)])
        rows, own = x.reshape(groups, -1, in_features), own.transpose(1, 2)
        ctx.save_for_backward(x, weight)
        ctx.layout = layout
        if onto is None:
            return torch.bmm(rows, own).reshape(*x.shape[:-1], out_features)
        if onto._is_view():  # autograd would copy the gradient of what overwrites a view
            return torch.baddbmm(onto.reshape(groups, -1, out_features), rows, own).reshape(onto.shape)
        ctx.mark_dirty(onto)
        onto.view(groups, -1, out_features).baddbmm_(rows, own)
        return onto

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        layout: RowLayout = ctx.layout
        groups = len(weight) if layout.equal else len(x)
        g = gradient.reshape(groups, -1, weight.shape[1])
        gradient_x = gradient_weight = None
        if ctx.needs_input_grad[0]:
            own = weight if layout.equal else weight[layout.clients(x.device)]
            gradient_x = torch.bmm(g, own).reshape(x.shape)
        if ctx.needs_input_grad[1] and not layout.per_example:
            products = torch.bmm(g.transpose(1, 2), x.reshape(groups, -1, weight.shape[2]))
            gradient_weight = products if layout.equal else layout.sum_rows(products)
        return gradient_x, gradient_weight, None, gradient if ctx.needs_input_grad[3] else None


def stacked_product(
    x: torch.Tensor, weight: torch.Tensor, layout: RowLayout, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """Return y_n = x_n W_{c(n)}^T for every row n, with c(n) the row's client.

    Parameters
    ----------
    x : Tensor [N, ..., n]
    weight : Tensor [K, m, n]
        One for each client, or one [1, m, n] that all share, which then has no gradient.
    layout : RowLayout
    onto : Tensor [N, ..., m], optional
        What the products are added to, in the same pass over memory. It may be overwritten.

    Returns
    -------
    Tensor [N, ..., m]
    """
    if not weight.requires_grad and len(weight) == 1:
        if onto is None:
            return functional.linear(x, weight[0])
        return torch.addmm(onto.flatten(0, -2), x.flatten(0, -2), weight[0].T).view_as(onto)
    stacked: torch.Tensor = _StackedProduct.apply(x, weight, layout, onto)
    return stacked


class StackedLayer(nn.Module):
    """A layer whose parameters carry a leading client axis: what the library asks of what it trains.

    A subclass has a ``weight``, computes every row with its own client's, and gives it per-example gradients by Opacus'
    ``register_grad_sampler``.

    Attributes
    ----------
    weight : Parameter [K, ...]
        While it is frozen, K is 1 and all clients share it.
    layout : RowLayout
        Says which client each row belongs to.
    ghost : bool
        Leave per-example gradients of the weight as :class:`RowProducts`, in a layer that can.
    name : str
        What errors call it.
    """

    weight: nn.Parameter

    def __init__(self, layout: RowLayout) -> None:
        super().__init__()
        self.layout, self.ghost, self.name = layout, False, "a trained layer"

    def ghost_norms_pay(self, tokens: int) -> bool:
        """Say whether ghost norms cost less for rows of so many tokens; never by default: the layer has none."""
        return False


class StackedLinear(StackedLayer):
    """A linear layer whose parameters carry a leading client axis.

    Parameters
    ----------
    in_features, out_features : int
    layout : RowLayout
        Says which client each row belongs to.
    bias : bool
    dtype : torch.dtype
        Of the parameters; the product is taken in the input's dtype.

    Attributes
    ----------
    weight : Parameter [K, out_features, in_features]
        While it is frozen, K is 1 and all clients share it.
    bias : Parameter [K, out_features] or None
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layout: RowLayout,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(layout)
        self.weight = nn.Parameter(torch.zeros(1, out_features, in_features, dtype=dtype, device=device), False)
        self.bias = nn.Parameter(torch.zeros(1, out_features, dtype=dtype, device=device), False) if bias else None

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[1]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[2]

    def forward(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """Map x [N, ..., in_features] to [N, ..., out_features], each row with its own client's weights.

        The result is added to ``onto``, if that is given, which it may overwrite. It has to be given by name: hooks see
        what comes by place.

        Raises
        ------
        GuardError
            If x has other rows than the layout says, where it matters whose a row is.
        """
        self.layout.check_rows(len(x), self.name)
        y = stacked_product(x, self.weight.to(x.dtype), self.layout, onto)
        if self.bias is None:
            return y
        return y + self.layout.by_row(self.bias.to(x.dtype), x)

    def ghost_norms_pay(self, tokens: int) -> bool:
        """Compare what both move through memory."""
        return ghost_norms_pay(tokens, self.out_features, self.in_features)


def row_pairs(layer: StackedLayer, inputs: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's inputs and the gradients of its outputs as [N, T, features], whatever lies between.

    Raises
    ------
    GuardError
        If there are other rows than the layout says.
    """
    for tensor in (inputs, gradients):
        layer.layout.check_rows(len(tensor), layer.name)
    rows = len(gradients)
    return inputs.reshape(rows, -1, inputs.shape[-1]), gradients.reshape(rows, -1, gradients.shape[-1])


@register_grad_sampler(StackedLinear)
def stacked_linear_grad_sample(
    layer: StackedLinear, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor | RowProducts]:
    """Per-example gradients for Opacus: gs_n = g_n^T x_n, of shape [N, out, in] on a weight [K, out, in].

    Raises
    ------
    GuardError
        If there are other rows than the layout says.
    """
    x, g = row_pairs(layer, activations[0], backprops)
    samples: dict[nn.Parameter, torch.Tensor | RowProducts] = {}
    if layer.weight.requires_grad and layer.ghost:
        samples[layer.weight] = RowProducts(g.to(layer.weight.dtype), x.to(layer.weight.dtype))
    elif layer.weight.requires_grad:
        samples[layer.weight] = torch.bmm(g.transpose(1, 2), x.to(g.dtype)).to(layer.weight.dtype)
    if layer.bias is not None and layer.bias.requires_grad:
        samples[layer.bias] = g.sum(1).to(layer.bias.dtype)
    return samples


class ClientDropout(nn.Module):
    """Dropout whose masks come from each client's own generator and do not depend on the other clients' rows."""

    def __init__(self, p: float, layout: RowLayout) -> None:
        super().__init__()
        self.p, self.layout = p, layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero elements of x [N, T, features] or [N, features] with probability p and scale the rest by 1 / (1 - p)."""
        generators = self.layout.dropout_generators
        if self.p == 0 or not self.training or generators is None:
            return x
        # A client's generator is on one device, where a split model's draws are made for all layers.
        draws = torch.ones(x.shape, device=next((g.device for g in generators if g is not None), x.device))
        start = 0
        # A client's mask has its own longest length, so that padding to another client's length draws nothing more.
        for count, length, generator in zip(self.layout.counts, self.layout.lengths, generators, strict=True):
            # A client alone may have a layer that sees other rows, such as all tokens in a line.
            rows = draws[start : start + count] if len(generators) > 1 else draws
            if count:
                drawn = rows[:, :length] if x.dim() > 2 else rows
                if generator is None:
                    self.layout.fill_secret(drawn)
                else:
                    drawn.uniform_(generator=generator)
            start += count
        return x * (draws >= self.p).to(x) / (1 - self.p)
