"""Parameterisations of a layer's update, one file each: which arrays are trained, and what they add to the layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fedlora.adapters.layers import AdapterLayer, FactoredLinear
from fedlora.adapters.stacked import RowLayout
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.models import linear_shape

if TYPE_CHECKING:
    from peft import PeftConfig


class Parameterisation(ABC):
    """What is trained beside a frozen linear layer of m outputs and n inputs. Stateless.

    Arrays of the model are named ``PATH.KIND``, by the layer's module path and a kind of :meth:`shapes`. They are the
    layer's stacked parameters without the client axis. They need not be matrices, nor the update a product. Under DP
    every :class:`~fedlora.adapters.stacked.StackedLayer` needs a gradient sampler of its own
    (``opacus.grad_sample.register_grad_sampler``).

    Attributes
    ----------
    name : str
        :attr:`fedlora.methods.Method.parameterisation`, and the name of the file.
    """

    name: ClassVar[str]

    @abstractmethod
    def shapes(self, out_features: int, in_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        """Return the kinds of its arrays and their shapes, in the order in which the input meets them."""

    def shapes_at(self, adapter: AdapterLayer, rank: int) -> Mapping[str, tuple[int, ...]]:
        """Return :meth:`shapes` of a layer for a client of a rank: leading blocks of those for a larger one."""
        return self.shapes(*linear_shape(adapter.base), rank)

    @abstractmethod
    def layer(self, path: str, base: nn.Module, config: Config, layout: RowLayout) -> AdapterLayer:
        """Return what takes the place of the frozen layer at a module path; all its arrays are zero.

        Raises
        ------
        InputError
            If it does not fit that layer.
        """

    @abstractmethod
    def update(self, factors: Arrays, frozen: Arrays, scaling: float) -> Arrays:
        """Return what one client's arrays add to the parameters of the frozen layer.

        Parameters
        ----------
        factors : dict of str to Tensor
            By kind.
        frozen : dict of str to Tensor
            ``weight`` [m, n] and, where the layer has one, ``bias`` [m].
        scaling : float
            s = alpha / rank.

        Returns
        -------
        dict of str to Tensor
            ``weight``, which is dW [m, n], and ``bias`` where it changes.
        """

    @abstractmethod
    def peft_arrays(self, factors: Arrays, residual: torch.Tensor | None, scaling: float) -> Arrays:
        """Return one layer's arrays as PEFT saves them, by what follows the module's path in their names.

        Parameters
        ----------
        factors : dict of str to Tensor
            One client's, by kind.
        residual : Tensor [m, n] or None
            What the run added to the frozen weight; it is part of the exported adapter.
        scaling : float

        Raises
        ------
        InputError
            If PEFT has no form for it.
        """

    @abstractmethod
    def peft_config(self, layers: Mapping[str, Arrays], config: Config, settings: dict[str, Any]) -> PeftConfig:
        """Return the PEFT config of an adapter.

        Parameters
        ----------
        layers : mapping of str to dict
            What :meth:`peft_arrays` gave, by module path.
        config : Config
            The run's.
        settings : dict
            What all of PEFT's configs for linear layers have: target_modules, task_type and others.
        """


class LowRank(Parameterisation):
    """A product of matrices of low rank, which can be written as a LoRA: dW = s F_k ... F_1 = s B A."""

    @abstractmethod
    def to_lora(self, factors: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [r, n] and B [m, r]."""

    def layer(self, path: str, base: nn.Module, config: Config, layout: RowLayout) -> FactoredLinear:
        """Return the frozen layer with a branch; refuse a rank above the layer's size."""
        rank, (m, n) = config.method.rank, linear_shape(base)
        if rank > min(m, n):
            remedy = f"is above the size of {path} ({m} x {n}); use {min(m, n)} or less"
            raise InputError("method.rank", rank, remedy)
        shapes = self.shapes(m, n, rank)
        return FactoredLinear(base, shapes, config.scaling(), layout, config.method.dropout)

    def update(self, factors: Arrays, frozen: Arrays, scaling: float) -> Arrays:
        """dW = s B A."""
        a, b = self.to_lora(factors)
        return {"weight": scaling * (b @ a)}

    def peft_arrays(self, factors: Arrays, residual: torch.Tensor | None, scaling: float) -> Arrays:
        """Return A and B of s B A; with a residual, of residual + s B A."""
        a, b = self.to_lora(factors)
        if residual is not None:
            a, b = _factored(residual, a, b, scaling)
        return {"lora_A.weight": a.contiguous(), "lora_B.weight": b.contiguous()}

    def peft_config(self, layers: Mapping[str, Arrays], config: Config, settings: dict[str, Any]) -> PeftConfig:
        """LoRA of the largest rank, with ``rank_pattern`` where layers differ, and alpha = s r."""
        from peft import LoraConfig  # slow, and first used at a run's end

        ranks = {path: len(arrays["lora_A.weight"]) for path, arrays in layers.items()}
        rank = max(ranks.values(), default=config.method.rank)
        smaller = {path: r for path, r in ranks.items() if r != rank}
        return LoraConfig(
            r=rank,
            lora_alpha=config.scaling() * rank,  # type: ignore[arg-type]  # any number
            rank_pattern=smaller,
            alpha_pattern={path: config.scaling() * r for path, r in smaller.items()},
            lora_dropout=config.method.dropout,
            **settings,
        )


def _factored(
    residual: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [k, n] and B [m, k] with s B A = residual + s b a, at the numerical rank k of this sum.

    Parameters
    ----------
    residual : Tensor [m, n]
    a : Tensor [r, n]
    b : Tensor [m, r]
    scaling : float
        s.

    Notes
    -----
    A full singular value decomposition in float64: O(m n min(m, n)) operations, and memory for several matrices [m, n].
    """
    total = residual.double() + scaling * (b.double() @ a.double())
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    # Rounding in float32 puts singular values of this size into a sum of small factors.
    rank = max(1, int((s > 4 * torch.finfo(a.dtype).eps * s.norm()).sum()))
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]).to(a.dtype), (u[:, :rank] * root / scaling).to(a.dtype)
