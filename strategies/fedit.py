"""FedIT: federated averaging of both LoRA factors."""

from __future__ import annotations

from typing import ClassVar

from fedlora.strategies.both_factors import BothFactors


class FedIT(BothFactors):
    """FedIT: A = sum p_i A_i and B = sum p_i B_i (Zhang et al., arXiv 2305.05644).

    The mean of the factors is not the mean of the updates: sum p_i B_i A_i differs from it by
    sum p_i (B_i - Bbar)(A_i - Abar). The other methods exist to avoid that; this one is their baseline.
    """

    name = "fedit"
    title = "FedIT: both factors averaged"
    paper = "arXiv 2305.05644"
    sends = "A and B: r (m + n) each way"
    color, marker = "green", "diamond"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-2, "sgd": 0.1}
