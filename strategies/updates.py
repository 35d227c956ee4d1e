"""What clients sent in a round, one client at a time, on its way into the aggregate.

A reply is decoded by the codec of the uplink, checked (:func:`~strategies.replies.read_update`) and weighed: it is an
:class:`Update`. The method's aggregate takes the updates as they come, in client order. The server optimiser then
steps from the arrays before to the aggregate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import MetricRecord

from fedlora.arrays import Arrays
from fedlora.communication.codecs import named
from fedlora.strategies.aggregation import Drift, WeightedMean

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Update:
    """What one client sent.

    Attributes
    ----------
    client : int
    weight : float
        p_i before normalisation: its number of examples.
    vector : Tensor [n]
        All its numbers, in the order of ``shapes``.
    shapes : mapping of str to tuple of int
    metrics : MetricRecord
    """

    client: int
    weight: float
    vector: torch.Tensor
    shapes: Shapes
    metrics: MetricRecord = field(default_factory=MetricRecord)

    @property
    def arrays(self) -> Arrays:
        """The arrays by name; views of ``vector``."""
        return named(self.vector, self.shapes)


class Updates:
    """The updates of a round, to be taken once: iterate over them, or ask for their :meth:`mean`.

    They are read as the replies come, so that a mean holds one sum and not an array of every client.

    Parameters
    ----------
    stream : iterator of Update
    start : Tensor [n], optional
        What all clients started from, for :attr:`drift`; None where clients' arrays have shapes of their own.
    """

    def __init__(self, stream: Iterator[Update], start: torch.Tensor | None = None) -> None:
        self._stream, self._start = stream, start
        self._mean = WeightedMean()
        self._drift = None if start is None else Drift({"all": start})
        self._shapes: Shapes = {}

    def __iter__(self) -> Iterator[Update]:
        for update in self._stream:
            if self._drift is not None:
                self._add(update)
            yield update

    def _add(self, update: Update) -> None:
        self._shapes = update.shapes
        self._mean.add({"all": update.vector}, update.weight)
        if self._drift is not None:
            self._drift.add({"all": update.vector}, update.weight)

    def mean(self) -> Arrays | None:
        """Return sum p_i X_i with p_i = w_i / sum w; None where nothing of any weight came."""
        for update in self._stream:
            self._add(update)
        found = self._mean.result()
        return None if found is None else named(found["all"], self._shapes)

    def drain(self) -> None:
        """Take what the method left, so that every client is counted."""
        for _ in self:
            pass

    def drift(self) -> float | None:
        """How far the clients moved apart, once all updates were taken; see :class:`~strategies.aggregation.Drift`."""
        return None if self._drift is None else self._drift.result(self._mean.result())


def product_norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """Return the Frobenius norm of B A, of B [m, r] and A [r, n].

    No m x n matrix is made: with B = Q R and A^T = Q' R', it is that of R R'^T.
    """
    left, right = (torch.linalg.qr(factor.double(), mode="r")[1] for factor in (b, a.T))
    return float((left @ right.T).norm())


def update_norm(update: Update) -> float:
    """Return the Frobenius norm of a client's B A over all layers together; it may not be finite where these are."""
    norms = []
    for name, b in update.arrays.items():
        path, _, kind = name.rpartition(".")
        if kind == "lora_B":
            norms.append(product_norm(b, update.arrays[f"{path}.lora_A"]))
    return math.hypot(*norms)


def normalised(updates: list[Update]) -> list[float]:
    """Return the clients' weights p_i, which sum to 1; equal shares if all weights are 0."""
    total = math.fsum(update.weight for update in updates)
    return [update.weight / total if total else 1 / len(updates) for update in updates]
