"""Any adapter that PEFT offers, averaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from fedlora.adapters import AdaptedModel
from fedlora.adapters.peft_bridge import (
    DRAWN_KIND,
    TRAINED_KIND,
    PeftAdaptedModel,
    adapt_peft,
    alpha_key,
    export_adapter,
    peft_config,
    rank_key,
)
from fedlora.arrays import Arrays
from fedlora.config import Config, MethodSection
from fedlora.data.tokens import FederatedData
from fedlora.roles import FROZEN, HEAD, TRAINED, Roles
from fedlora.strategies.base import Contact, FederatedStrategy, Payload, Sizes


class PeftOptions(MethodSection):
    """``[method]`` of a run with one of PEFT's adapters."""

    peft_type: str = Field(
        default="VERA",
        description="PEFT's name of the adapter, as in peft.PeftType: VERA, RANDLORA, SHIRA, MISS, FOURIERFT, LOHA ...",
        examples=["LOHA"],
    )
    peft: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of that type's own config in PEFT, such as d_initial = 0.2; PEFT's defaults otherwise.",
        examples=[{"d_initial": 0.3}],
    )


@dataclass(frozen=True)
class CountedSizes(Sizes):
    """Sizes of an adapter without a formula of its own: its numbers are counted.

    Attributes
    ----------
    trained : int
        Numbers that clients train, without the head.
    drawn : int
        Numbers that the server draws once.
    """

    trained: int = 0
    drawn: int = 0


class Peft(FederatedStrategy):
    """Any of PEFT's adapters, by plain averaging of what it trains (PEFT: Mangrulkar et al., 2022).

    PEFT makes the adapter and computes with it; ``method.peft_type`` names it, and ``[method.peft]`` holds its own
    keys. What it draws at random and never trains, such as VeRA's projections, is drawn once by the server, from the
    run's seed, and sent once: all clients hold the same numbers. ``method.rank`` is the type's r where it has one.

    Whether the mean is exact depends on the type: it is where every layer's output is linear in what is trained, as in
    FourierFT, SHiRA and IA3, and not where two trained factors are multiplied, as in VeRA, LoHa and DoRA. It is
    measured, on small layers of drawn weights, and summary.json says so (``peft.exact``). The class says no, as its
    default type, VeRA, does.

    Notes
    -----
    A type does not fit, and is refused with the reason, if PEFT cannot put it into the layers, if it changes the input
    (prompts), the frozen weights, or its own ranks between steps, if it draws at random in training (dropout), or if
    what PEFT saves of it does not give it back.

    Clients of a cohort share the frozen blocks' passes; layers with adapters run client by client. Per-example
    gradients come from a second pass of each adapted layer, by functorch, or row by row where a type does not run under
    it; both are slower than the layers of the other methods.

    The default rates are for the default type, and reasoned rather than tuned: AdamW moves each number by about its
    rate in a step, and VeRA's vectors are of the size 0.1, so that 1e-2 is a tenth of them. Types differ by a factor of
    ten or more each way: large scales, such as RandLoRA's, want less. Tune the rate for each type.
    """

    name = "peft"
    title = "Any adapter of PEFT's, averaged"
    paper = "PEFT 0.21"
    sends = "what the adapter trains, each way"
    color, marker = "grey", "star"
    quantized = False
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 1e-2, "sgd": 0.5}
    Options = PeftOptions
    options: PeftOptions

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """What PEFT trains is trained; the rest of the adapter is sent once."""
        return {TRAINED_KIND: TRAINED, DRAWN_KIND: FROZEN, HEAD: TRAINED}

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a type or keys that PEFT does not know, or values that it refuses."""
        options = _options(config)
        peft_config(options.peft_type, options.peft, config, target_modules=["any"])

    @classmethod
    def unused(cls, config: Config) -> Iterator[tuple[str, str]]:
        """Name the common keys that the type has nothing for."""
        kind = _options(config).peft_type
        if rank_key(kind) is None:
            yield "rank", f"{kind} does not go by a rank r"
        if alpha_key(kind) is None:
            yield "alpha", f"{kind} has no alpha"
        yield "dropout", "PEFT would draw one mask for the clients of a cohort together"

    @classmethod
    def adapt(cls, model: nn.Module, config: Config) -> PeftAdaptedModel:
        """Let PEFT put its adapter into the model."""
        options = _options(config)
        return adapt_peft(model, config, options.peft_type, options.peft)

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """The adapter as PEFT drew it from the run's seed."""
        return adapted.arrays(adapted.names([TRAINED_KIND, DRAWN_KIND]))

    def sizes(self, adapted: AdaptedModel) -> CountedSizes:
        """Count the adapter's numbers beside the usual sizes."""
        trained, drawn = (
            sum(adapted.parameter(name)[0].numel() for name in adapted.names([kind]))
            for kind in (TRAINED_KIND, DRAWN_KIND)
        )
        return CountedSizes(**vars(super().sizes(adapted)), trained=trained, drawn=drawn)

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """What is trained, both ways; what is drawn, once."""
        assert isinstance(sizes, CountedSizes)
        numbers = sizes.trained + sizes.head
        return Payload(initial=sizes.drawn, down=numbers, up=numbers)

    def export(self, adapted: AdaptedModel, data: FederatedData, folder: Path) -> None:
        """Write ``adapter/`` as PEFT's own save_pretrained does."""
        assert isinstance(adapted, PeftAdaptedModel)
        options = self.options
        export_adapter(adapted, self.config, options.peft_type, options.peft, folder / "adapter", data.label_names)

    def facts(self, adapted: AdaptedModel) -> dict[str, Any]:
        """Say which type it is, whether its mean is exact, and how per-example gradients are taken."""
        assert isinstance(adapted, PeftAdaptedModel)
        sizes, probed = self.sizes(adapted), adapted.probed
        about = {"type": self.options.peft_type, "exact": probed.exact, "per_example_gradients": probed.way}
        return {"peft": {**about, "trained_numbers": sizes.trained, "drawn_numbers": sizes.drawn}}


def _options(config: Config) -> PeftOptions:
    options = config.method
    assert isinstance(options, PeftOptions)
    return options
