"""LA-LoRA: LoRA's two factors trained in turns, local step by local step."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedlora.config import MethodSection
from fedlora.strategies.both_factors import BothFactors


class LALoRAOptions(MethodSection):
    """``[method]`` of a run of LA-LoRA."""

    smoothing: bool = Field(
        default=True,
        description="Smooth the factors' gradients along their long side before each step, which reduces their noise.",
    )


class LALoRA(BothFactors):
    """LA-LoRA: odd local steps train B, even ones A; noisy gradients are smoothed (Liu et al., arXiv 2602.19926).

    Under DP-SGD with both factors the error is quadratic in the noise, and the gradient of one factor depends on the
    other, which moves at the same time. Where a step trains one factor beside a fixed one, the noise enters dW = s B A
    linearly. Unlike RoLoRA, a round trains both. The server averages both, as FedIT does: the mean is not exact.

    Notes
    -----
    As published: a round's first step trains B, the second A, and so on; after clipping and noise, and before the
    optimiser's step, a fixed low-pass filter with weights (1, 4, 6, 4, 1) / 16 runs over the gradient, along the inputs
    of A and along the outputs of B. It works on what was noised, so that epsilon stays what it is.

    Ours: the head is trained in every step, and not smoothed; beyond an edge the filter sees the edge's own value; the
    clipping norm is fixed, where the authors' code lets it follow the median norm of the gradients, which no epsilon
    covers; without privacy the filter works too. A step's clipping norm is that of what the step trains: the factor
    whose turn it is, and the head. A round of one local step trains no A.
    """

    name = "la-lora"
    title = "LA-LoRA: the factors trained in turns by local step"
    paper = "arXiv 2602.19926"
    sends = "A and B: r (m + n) each way"
    color, marker = "orange", "left"
    Options = LALoRAOptions
    options: LALoRAOptions
    client = "fedlora.clients.la_lora:AlternatingHalf"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-2, "sgd": 0.1}
