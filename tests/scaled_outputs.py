"""A parameterisation that is no product of matrices, and a method of it, as another package would add them.

As in (IA)^3 (Liu et al., arXiv 2205.05638) a vector scales a layer's output: y = (1 + v) * (W0 x + b).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from opacus.grad_sample import register_grad_sampler
from peft import IA3Config, PeftConfig
from torch import nn

from fedlora.adapters import AdaptedModel, AdapterLayer, RowLayout, StackedLayer
from fedlora.adapters.layers import adapter_dtype
from fedlora.adapters.model import linear_shape
from fedlora.adapters.parameterisations import Parameterisation
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.errors import InputError
from fedlora.roles import HEAD, TRAINED, Roles
from fedlora.strategies.base import Contact, FederatedStrategy, Payload, Sizes


class StackedScale(StackedLayer):
    """A vector for each client, by which its rows are multiplied."""

    def __init__(self, base: nn.Module, layout: RowLayout) -> None:
        super().__init__(layout)
        zero = torch.zeros(1, linear_shape(base)[0], dtype=adapter_dtype(base), device=base.weight.device)
        self.weight = nn.Parameter(zero, False)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Map y [N, ..., m] to v * y, each row with its own client's v [m]."""
        self.layout.check_rows(len(y), self.name)
        return y * self.layout.by_row(self.weight.to(y.dtype), y)


@register_grad_sampler(StackedScale)
def scale_grad_sample(
    layer: StackedScale, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """Per-example gradients gs_n = sum over positions of g * y, [N, m]."""
    layer.layout.check_rows(len(backprops), layer.name)
    return {layer.weight: (backprops * activations[0]).reshape(len(backprops), -1, backprops.shape[-1]).sum(1)}


class ScaledLinear(AdapterLayer):
    """A frozen linear layer whose output is scaled."""

    def added(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return v * y."""
        added: torch.Tensor = self.scale_v(y)
        return added


class ScaledOutputs(Parameterisation):
    """One vector a layer."""

    name = "scaled-outputs"

    def shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Return that of v [m]."""
        return {"scale_v": (out_features,)}

    def layer(self, path: str, base: nn.Module, config: Config, layout: RowLayout) -> ScaledLinear:
        """Scale by 1."""
        return ScaledLinear(base, {"scale_v": StackedScale(base, layout)}, layout)

    def update(self, factors: Arrays, frozen: Arrays, scaling: float) -> Arrays:
        """dW = diag(v) W0, and v * b."""
        v = factors["scale_v"]
        return {name: v.reshape(-1, *(1,) * (array.dim() - 1)) * array for name, array in frozen.items()}

    def peft_arrays(self, factors: Arrays, residual: torch.Tensor | None, scaling: float) -> Arrays:
        """PEFT multiplies by 1 + v."""
        if residual is not None:
            raise InputError("method.name", self.name, "PEFT has no scaled outputs beside a residual; export it whole")
        return {"ia3_l": 1 + factors["scale_v"][:, None]}

    def peft_config(self, layers: Mapping[str, Arrays], config: Config, settings: dict[str, Any]) -> PeftConfig:
        """None of the layers scales its input."""
        return IA3Config(feedforward_modules=[], **settings)


class ScaledMean(FederatedStrategy):
    """Averages the vectors; the model is linear in them, so that their mean is exactly the mean of the updates."""

    name = "scaled-mean"
    title = "Scaled outputs: vectors averaged"
    paper = "arXiv 2205.05638"
    exact = True
    parameterisation = "scaled-outputs"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 1e-2, "sgd": 0.1}

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """All is trained."""
        return {"scale_v": TRAINED, HEAD: TRAINED}

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """Scale by 1."""
        return {name: torch.zeros_like(a) for name, a in adapted.arrays(adapted.names(["scale_v"])).items()}

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """m a layer, both ways."""
        numbers = sum(m for m, _ in sizes.layers) + sizes.head
        return Payload(initial=0, down=numbers, up=numbers)
