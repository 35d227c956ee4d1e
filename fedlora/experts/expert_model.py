"""An owner's expert while it trains: a low-rank (or full) update of the feed-forward block, and its router row.

The block holds two experts, the public one and the owner's, both active; their weights are the softmax over two logits,
which is the sigmoid of the difference. Everything but the owner's expert, row and bias is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fedlora.adapters.layers import FactoredLinear, adapter_dtype
from fedlora.adapters.model import AdaptedModel, never_cache
from fedlora.adapters.parameterisations import lora
from fedlora.adapters.stacked import RowLayout, StackedLinear
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.experts.expert import FULL, Rank, break_even_rank, truncate
from fedlora.experts.feed_forward import ExpertShapes, FeedForward, find_feed_forwards, public_digest, replace
from fedlora.experts.options import expert_options

KIND = "expert"
"""The parameterisation's name."""

FACTORS = ("lora_A", "lora_B", "delta", "router", "router_bias")
"""What owners train and send, where their rank has it."""

ALPHA = 8.0
"""alpha by default: rank 16 gets s = 2, as in the published low-rank setting that the defaults were tried at."""


def expert_scaling(config: Config, rank: Rank) -> float:
    """Return s in dW = s B A while it trains: alpha / sqrt(r), by which a larger rank learns as fast as a small one.

    alpha / r would slow large ranks down, a fixed s would drive them too far (Kalajdzievski, arXiv 2312.03732).
    """
    return 1.0 if rank == FULL else (config.method.alpha or ALPHA) / math.sqrt(rank)


def trained_rank(config: Config, rank: Rank) -> Rank:
    """Return the rank at which an owner trains: full where it is truncated only before it leaves."""
    return FULL if expert_options(config).extraction == "svd" else rank


class OwnerBlock(nn.Module):
    """A feed-forward block of two experts: the public one and the owner's.

    Parameters
    ----------
    form : FeedForward
    model : torch.nn.Module
        The model, in which nothing is replaced yet in this block.
    layout : RowLayout
    """

    def __init__(self, form: FeedForward, model: nn.Module, layout: RowLayout) -> None:
        super().__init__()
        self.gated = "gate" in form.projections
        self.shapes = form.shapes(model)
        for role, path in form.projections.items():
            self.add_module(role, model.get_submodule(path))
        self.activation = form.activation
        up = model.get_submodule(form.projections["up"])
        weight: torch.Tensor = up.weight  # type: ignore[assignment]
        dtype = adapter_dtype(up)
        width = self.shapes["up"][1]
        self.router = StackedLinear(width, 1, layout, dtype=dtype, device=weight.device)
        # A layer of one input, so that the bias has per-example gradients before it is cut at 0.
        self.router_bias = StackedLinear(1, 1, layout, dtype=dtype, device=weight.device)
        self.public_router = StackedLinear(width, 1, layout, dtype=dtype, device=weight.device)

    def public(self, role: str) -> nn.Module:
        """Return the public model's layer of a projection."""
        layer: nn.Module = getattr(self, role)
        return layer.base if isinstance(layer, FactoredLinear) else layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, T, d] to [N, T, d]."""
        bias = self.router_bias(x.new_ones(*x.shape[:-1], 1)).clamp(max=0)
        weight = torch.sigmoid(self.router(x) + bias - self.public_router(x))
        up = self.public("up")(x)
        gate = self.public("gate")(x) if self.gated else None
        theirs = self._activate(gate, up)
        own = self._activate(None if gate is None else gate + self._branch("gate", x), up + self._branch("up", x))
        # As a difference: at the start, where the two are equal, the router's gradient is exactly 0.
        y: torch.Tensor = self.public("down")(theirs + weight * (own - theirs)) + self._branch("down", weight * own)
        return y

    def _branch(self, role: str, x: torch.Tensor) -> torch.Tensor:
        adapter: FactoredLinear = getattr(self, role)
        return adapter.branch(x)

    def _activate(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        return self.activation(up) if gate is None else self.activation(gate) * up


class ExpertModel(ExpertShapes, AdaptedModel):
    """A public model with one owner's expert beside it, for a cohort of owners of one rank.

    Parameters
    ----------
    model : torch.nn.Module
        Frozen; changed in place.
    config : Config
        Section method: rank, alpha, dropout, extraction and how router rows start.

    Attributes
    ----------
    rank : int or "full"
        Of what leaves the client; see :meth:`prepare`.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__(model, RowLayout(), KIND, {}, {})
        self.config = config
        self.forms = find_feed_forwards(model)
        self.blocks: list[OwnerBlock] = [OwnerBlock(form, model, self.layout) for form in self.forms]
        for form, block in zip(self.forms, self.blocks, strict=True):
            replace(model, form, block)
        self.rank: Rank = -1
        self._digest: str | None = None
        self.set_rank(config.method.rank)

    @property
    def public_digest(self) -> str:
        """SHA-256 of the public model's weights."""
        if self._digest is None:
            self._digest = public_digest(self.model, self.forms)
        return self._digest

    def set_rank(self, rank: Rank) -> None:
        """Make room for experts of a rank; what was trained before is dropped."""
        if rank == self.rank:
            return
        check_rank(rank, self.projections(), "method.ranks" if expert_options(self.config).ranks else "method.rank")
        trained = trained_rank(self.config, rank)
        scaling = expert_scaling(self.config, trained)
        self.adapters, self._layers = {}, {}
        for form, block in zip(self.forms, self.blocks, strict=True):
            for role, path in form.projections.items():
                m, n = block.shapes[role]
                shapes = {"delta": (m, n)} if trained == FULL else lora.LoRA().shapes(m, n, trained)
                public = block.public(role)
                adapter = FactoredLinear(public, shapes, scaling, self.layout, self.config.method.dropout)
                block.add_module(role, adapter)
                self.adapters[path] = adapter
                self._layers |= {f"{path}.{factor}": (getattr(adapter, factor), "weight") for factor in shapes}
            for name in ("router", "router_bias", "public_router"):
                self._layers[f"{form.path}.{name}"] = (getattr(block, name), "weight")
        self._name_layers()
        self.trained, self.rank = (), rank  # the rank last: if this is stopped before, it is done again

    def set_public(self) -> None:
        """Make the blocks compute what the public model does."""
        last = [f"{path}.{adapter.factors[-1]}" for path, adapter in self.adapters.items()]
        zeros = {name: torch.zeros(self.parameter(name).shape[1:]) for name in last}
        self.set_shared(self.arrays([name for name in self._layers if name not in zeros]) | zeros)

    def drawn(self, seed: int) -> Arrays:
        """Draw as for any adapters; a positive bias would be cut off, and have no gradient."""
        arrays = super().drawn(seed)
        return {n: -value.abs() if n.endswith("router_bias") else value for n, value in arrays.items()}

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Take on the rank of a message's settings (``rank``)."""
        self.set_rank(parse_rank(str(settings["rank"])))

    def begin(self, arrays: Arrays) -> Arrays:
        """Turn an expert that came into what is trained, the same dW: B A becomes s (B / s) A."""
        scaling = expert_scaling(self.config, trained_rank(self.config, self.rank))
        trains_full = trained_rank(self.config, self.rank) == FULL
        generator = torch.Generator().manual_seed(self.config.run.seed)
        found: Arrays = {}
        for path in self.adapters:
            if not trains_full:
                a, b = arrays[f"{path}.lora_A"], arrays[f"{path}.lora_B"]
                found[f"{path}.lora_A"] = _without_idle_rows(a, b, generator)
                found[f"{path}.lora_B"] = b / scaling
            elif self.rank == FULL:
                found[f"{path}.delta"] = arrays[f"{path}.delta"]
            else:
                found[f"{path}.delta"] = arrays[f"{path}.lora_B"] @ arrays[f"{path}.lora_A"]
        for path in self.routers():
            found[f"{path}.router"] = arrays[f"{path}.router"]
            # Above 0 the cut bias would have no gradient.
            found[f"{path}.router_bias"] = arrays[f"{path}.router_bias"].clamp(max=0)
        return found

    def finish(self, arrays: Arrays) -> Arrays:
        """Turn what was trained into the expert that leaves: s folded into B, truncated by SVD where so configured."""
        trained = trained_rank(self.config, self.rank)
        scaling = expert_scaling(self.config, trained)
        found: Arrays = {}
        for path in self.adapters:
            if trained != FULL:
                found[f"{path}.lora_A"] = arrays[f"{path}.lora_A"]
                found[f"{path}.lora_B"] = arrays[f"{path}.lora_B"] * scaling
            elif self.rank == FULL:
                found[f"{path}.delta"] = arrays[f"{path}.delta"]
            else:
                b, a = truncate(arrays[f"{path}.delta"], self.rank)
                found |= {f"{path}.lora_A": a, f"{path}.lora_B": b}
        for path in self.routers():
            found[f"{path}.router"] = arrays[f"{path}.router"]
            found[f"{path}.router_bias"] = arrays[f"{path}.router_bias"].clamp(max=0)
        return found


def _without_idle_rows(a: torch.Tensor, b: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw the rows of A [r, n] anew that are zero and meet a zero column of B [m, r]: dW stays, and they learn.

    Such zeros fill up an expert to which only clients of a lower rank contributed; neither factor has a gradient there.
    """
    idle = (a == 0).all(1) & (b == 0).all(0)
    if not idle.any():
        return a
    drawn = lora.initial_factors(len(b), a.shape[1], len(a), generator)["lora_A"]
    return torch.where(idle[:, None], drawn.to(a.dtype), a)


def check_rank(rank: Rank, projections: Mapping[str, tuple[int, int]], field: str) -> None:
    """Refuse a rank that a projection is too small for.

    Raises
    ------
    InputError
        Naming the projection and the largest rank.
    """
    for path, (m, n) in projections.items():
        if rank != FULL and rank > min(m, n):
            best = f'use {min(m, n)} or less, or "full" (the break-even rank is {break_even_rank([(m, n)]):.0f})'
            raise InputError(field, rank, f"is above the size of {path} ({m} x {n}); {best}")


def parse_rank(text: str) -> Rank:
    """Read a rank from a message's or a table's text."""
    return FULL if text == FULL else int(text)


def adapt_experts(model: nn.Module, config: Config) -> ExpertModel:
    """Put an owner's expert beside every feed-forward block of a frozen model, in place.

    Raises
    ------
    InputError
        If the model has no feed-forward block of a known form, or the rank is above a layer's size.
    """
    never_cache(model)
    return ExpertModel(model, config)
