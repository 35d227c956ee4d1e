"""How much goes through a model at once on a GPU: what keeps it busy, since more costs memory and gains no time.

A pass computes, for each frozen matrix, one large product and several small kernels. Once the product takes longer than
the host needs to launch them, further tokens lengthen a pass in proportion. The rule looks at shapes and lengths alone,
not at a clock or a card, so that a run splits its batches, and adds up their gradients, in the same way everywhere.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import AdaptedModel
from fedlora.models import linear_shape
from fedlora.quantization import is_quantized

BUSY = 2e11
"""FLOPs of a pass' mean matrix product that keep a GPU busy: 200 microseconds at 10^15 FLOP/s, the matrix rate of a
data centre's GPU. The host takes about as long to launch what belongs to a product. A slower GPU is busy with less."""

QUANTIZED = 2
"""A pass over a quantised base has BUSY / QUANTIZED. Such a base is chosen to save memory, and the GPU computes its
weights again in every pass."""

COHORT = 2
"""Where one client's product is below BUSY, a pass of several has one of up to so many times BUSY: they also share what
a pass costs beside its kernels. From 1.4e11 to 4.1e11 FLOPs, BERT-large went from 109 to 150 client steps a second on
H200s (``experiments/benchmarks/results``: ``cohort_speed_granularity.json`` and ``cohort_speed.json``)."""

SMALLEST = 8
"""A pass of BUSY / SMALLEST is the smallest one tried before gradient checkpointing, which costs a third of a step."""


@dataclass(frozen=True)
class Passes:
    """What goes through the model at once.

    Attributes
    ----------
    rows : int or None
        Examples of each client; None for whole batches.
    smallest : int
        Examples below which gradient checkpointing costs less time than a smaller pass.
    clients : int
        The most clients that are worth a pass; memory may hold fewer.
    busy : bool
        Whether one client's examples keep the GPU busy.
    """

    rows: int | None
    smallest: int
    clients: int
    busy: bool


def choose_passes(flops: float, tokens: float, batch: int, given: int | None = None, quantized: bool = False) -> Passes:
    """Choose how many examples of how many clients go through a model at once, by time alone.

    A batch is split into as many equal parts as keep the GPU busy each. Several clients share a pass only where one
    client's part does not.

    Parameters
    ----------
    flops : float
        Of the model's mean matrix product, a token (:func:`mean_product`).
    tokens : float
        Mean tokens of an example.
    batch : int
        Examples that a client's step expects.
    given : int, optional
        ``client.physical_batch_size``, where the config says it.
    quantized : bool
        Whether the base's weights are quantised.
    """
    work, enough = flops * tokens, BUSY / QUANTIZED if quantized else BUSY

    def part(least: float) -> int:
        parts = max(1, min(batch, int(batch * work / least)))
        return -(-batch // parts)

    rows = min(given or part(enough), batch)
    alone = rows * work
    busy = alone >= enough
    clients = 1 if busy else int(min(COHORT * enough / max(alone, 1.0), sys.maxsize))
    whole = given is None and rows == batch
    return Passes(None if whole else given or rows, min(rows, part(enough / SMALLEST)), clients, busy)


def mean_product(adapted: AdaptedModel) -> float:
    """Return the FLOPs a token of a model's mean frozen matrix product, of its layers without the output layer."""
    find_output = getattr(adapted.model, "get_output_embeddings", lambda: None)
    output = find_output()
    shapes = [
        linear_shape(module)
        for module in adapted.model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and not module.weight.requires_grad
    ]
    return 2 * sum(m * n for m, n in shapes) / max(1, len(shapes))


def has_quantized_base(adapted: AdaptedModel) -> bool:
    """Whether weights of a model are computed again in every pass."""
    return any(isinstance(m, nn.Linear) and is_quantized(m) for m in adapted.model.modules())


def in_force(adapted: AdaptedModel) -> bool:
    """Whether the rule holds on a model's device: a CPU is busy with a batch of any size."""
    return adapted.device.type == "cuda"
