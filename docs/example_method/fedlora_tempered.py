"""A method from a package of its own: LoRA, averaged by tempered numbers of examples."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.config import Config, MethodSection
from fedlora.data.tokens import FederatedData
from fedlora.roles import HEAD, TRAINED, Roles
from fedlora.strategies.base import Contact, FederatedStrategy, Payload, Sizes, drawn_factors


class TemperedOptions(MethodSection):
    """``[method]`` of a run of this method."""

    weight_power: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5,
        description="Clients weigh by their numbers of examples to this power; 0 gives all the same weight.",
    )


class TemperedLoRA(FederatedStrategy):
    """Both LoRA factors are averaged, by n_i^power instead of n_i, so that large clients count for less."""

    name = "tempered-lora"
    title = "Tempered LoRA: large clients count for less"
    paper = "an example"
    color, marker = "sky", "star"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-2, "sgd": 0.1}
    Options = TemperedOptions
    options: TemperedOptions

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """Both factors are trained."""
        return {"lora_A": TRAINED, "lora_B": TRAINED, HEAD: TRAINED}

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """A drawn for every layer, B = 0."""
        return drawn_factors(adapted, self.config.run.seed)

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """r (m + n) a layer, both ways."""
        numbers = sum(sizes.rank * (m + n) for m, n in sizes.layers) + sizes.head
        return Payload(initial=0, down=numbers, up=numbers)

    def weight(self, client: int) -> float:
        """n_i^power."""
        return super().weight(client) ** self.options.weight_power
