"""A method from a package of its own: LoRA, averaged by tempered numbers of examples."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedlora.config import MethodSection
from fedlora.strategies.fedit import FedIT


class TemperedOptions(MethodSection):
    """``[method]`` of a run of this method."""

    weight_power: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5,
        description="Clients weigh by their numbers of examples to this power; 0 gives all the same weight.",
    )


class TemperedLoRA(FedIT):
    """FedIT, with clients weighed by n_i^power instead of n_i, so that large clients count for less."""

    name = "tempered-lora"
    title = "Tempered LoRA: large clients count for less"
    paper = "an example"
    color, marker = "sky", "star"
    Options = TemperedOptions
    options: TemperedOptions

    def weight(self, client: int) -> float:
        """n_i^power."""
        return super().weight(client) ** self.options.weight_power
