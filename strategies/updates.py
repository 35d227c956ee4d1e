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
from fedlora.errors import GuardError
from fedlora.server.aggregators import Aggregator
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
    """The updates of a round, which can be read once: iterate over them, or take their :meth:`mean`.

    They are read as replies arrive, so that a mean holds one sum and not an array for every client.

    Parameters
    ----------
    stream : iterator of Update
    start : Tensor [n], optional
        The arrays from which all clients started, for :attr:`drift`; None if clients' arrays differ in shape.
    """

    def __init__(self, stream: Iterator[Update], start: torch.Tensor | None = None) -> None:
        self._stream, self._start = stream, start
        self._mean = WeightedMean()
        self._drift = None if start is None else Drift({"all": start})
        self._shapes: Shapes = {}
        self.missing = "no client that answered holds examples"  # said where nothing comes out

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


class OnlyCombined(Updates):
    """The updates of a round of which a method may know no more than what they are combined to.

    Parameters
    ----------
    stream : iterator of Update
    start : Tensor [n]
        What all clients started from; zeros where they send moves.
    shapes : mapping of str to tuple of int
    why : str
        What single updates would break.
    """

    def __init__(self, stream: Iterator[Update], start: torch.Tensor, shapes: Shapes, why: str) -> None:
        super().__init__(stream)
        self._from, self._shapes, self._why = start, shapes, why

    def __iter__(self) -> Iterator[Update]:
        """Refuse to show single updates.

        Raises
        ------
        GuardError
        """
        raise GuardError(f"the method reads single updates, {self._why}; it has to say reads_single_updates")

    def drain(self) -> None:
        """Do nothing: combining took all."""

    def moves(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield each client's move in float64, with its weight."""
        start = self._from.double()
        for update in self._stream:
            yield update.vector.double() - start, update.weight

    def moved(self, move: torch.Tensor) -> Arrays:
        """Return the start plus a move, by name."""
        return named((self._from.double() + move).to(self._from.dtype), self._shapes)

    def drift(self) -> float | None:
        """Nothing: how far single clients moved is not told."""
        return None


class CombinedUpdates(OnlyCombined):
    """Updates that are combined otherwise than by their mean (``server.aggregator``)."""

    def __init__(self, stream: Iterator[Update], start: torch.Tensor, shapes: Shapes, aggregator: Aggregator) -> None:
        super().__init__(stream, start, shapes, f"but server.aggregator is {aggregator.name}")
        self.aggregator = aggregator

    def mean(self) -> Arrays | None:
        """Return what the aggregator makes of the moves; None where too few came."""
        found = list(self.moves())
        weights = torch.tensor([weight for _, weight in found], dtype=torch.float64)
        if len(found) < self.aggregator.fewest:
            self.missing = f"{self.aggregator.name} needs {self.aggregator.fewest} replies, and {len(found)} came"
            return None
        if not weights.sum():
            return None
        return self.moved(self.aggregator.combine(torch.stack([move for move, _ in found]), weights))


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
