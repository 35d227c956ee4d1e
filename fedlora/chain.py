"""The chain between what a client trained and the mean: links that every update passes, on its way out and in.

On the client: the links' client parts in order, then the codec. On the server: the codec, the check of the numbers, the
links' server parts in the same order; then, once all are summed, what links do to the mean. ::

    client   trained -> link 1 -> link 2 -> encode
    server   decode -> check -> link 1 -> link 2 -> sum -> link 1 -> link 2 -> the next arrays

A link works on one vector of all numbers of an update. Without links an update is what its client sent, weighed by its
number of examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from flwr.app import ArrayRecord, MetricRecord

from fedlora.arrays import Arrays

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Update:
    """What one client sent.

    Attributes
    ----------
    client : int
    weight : float
        p_i before normalisation; by default its number of examples.
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
        parts = self.vector.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class ChainLink:
    """One thing that happens to every update. Each part does nothing by default."""

    def client(self, vector: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Change what a client is about to send.

        Parameters
        ----------
        vector : Tensor [n]
        start : Tensor [n]
            What the client started from, in the same order.
        """
        return vector

    def server(self, update: Update, start: torch.Tensor) -> Update:
        """Change what a client sent; somebody else's, so that a client part may not have been run.

        Raises
        ------
        ValueError
            If the update cannot be used; the text says why. It costs that client its place in the round.
        """
        return update

    def mean(self, vector: torch.Tensor, weights: Sequence[float], start: torch.Tensor) -> torch.Tensor:
        """Change the weighted mean of a round's updates; ``weights`` are theirs."""
        return vector


class Coder(Protocol):
    """What a chain asks of a codec (:mod:`fedlora.communication.codecs`)."""

    def encode(self, arrays: Mapping[str, torch.Tensor]) -> ArrayRecord:
        """Turn arrays into a record."""

    def decode_vector(self, record: ArrayRecord, shapes: Shapes) -> torch.Tensor:
        """Turn a record into one vector, or raise a ValueError."""


class UpdateChain:
    """Links around a codec. Both halves make the same chain of the same config.

    Parameters
    ----------
    codec : Coder
    links : sequence of ChainLink
    """

    def __init__(self, codec: Coder, links: Sequence[ChainLink] = ()) -> None:
        self.codec, self.links = codec, tuple(links)

    def send(self, arrays: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> ArrayRecord:
        """Return what leaves a client that trained ``arrays`` from ``start``."""
        if not self.links or not arrays:
            return self.codec.encode(arrays)
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        vector, origin = flat(arrays, shapes), flat(start, shapes)
        for link in self.links:
            vector = link.client(vector, origin)
        return self.codec.encode(Update(0, 0.0, vector, shapes).arrays)

    def receive(
        self, record: ArrayRecord, about: Update, start: torch.Tensor, check: Callable[[torch.Tensor, Shapes], None]
    ) -> Update:
        """Return an update as the mean takes it.

        Parameters
        ----------
        record : ArrayRecord
            What came.
        about : Update
            The client, its weight, its metrics and the shapes that were asked for; its vector is not looked at.
        start : Tensor [n]
        check : callable (Tensor, shapes)
            Raises a ValueError if a number cannot be used.

        Raises
        ------
        ValueError
            If the record is not what was asked for, a number cannot be used, or a link refuses it.
        """
        vector = self.codec.decode_vector(record, about.shapes)
        check(vector, about.shapes)
        update = replace(about, vector=vector)
        for link in self.links:
            update = link.server(update, start)
        return update

    def finish(self, mean: torch.Tensor, weights: Sequence[float], start: torch.Tensor) -> torch.Tensor:
        """Return what the links make of the mean."""
        for link in self.links:
            mean = link.mean(mean, weights, start)
        return mean


class ClipUpdate(ChainLink):
    """Bounds the norm of an update, its move from the start, over all arrays together.

    Parameters
    ----------
    max_norm : float
        C. A longer move is shortened to it, on the client and again on the server.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def client(self, vector: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Shorten the move."""
        move = vector.double() - start.double()
        norm = float(torch.linalg.vector_norm(move))
        return vector if norm <= self.max_norm else (start.double() + move * (self.max_norm / norm)).to(vector.dtype)

    def server(self, update: Update, start: torch.Tensor) -> Update:
        """Shorten it again: a client may not have done so."""
        return replace(update, vector=self.client(update.vector, start))


class EqualWeights(ChainLink):
    """Lets every client count alike, whatever number of examples it says it has."""

    def server(self, update: Update, start: torch.Tensor) -> Update:
        """Set the weight to 1."""
        return replace(update, weight=1.0)


class ServerNoise(ChainLink):
    """Adds Gaussian noise to the mean: sigma C on the sum of updates that weigh 1 each.

    Parameters
    ----------
    deviation : float
        sigma C, where C bounds the norm of each update (:class:`ClipUpdate`).
    generator : torch.Generator
    expected : float, optional
        By how many updates the sum is divided, where that must not tell how many came; the number that came by default.
    """

    def __init__(self, deviation: float, generator: torch.Generator, expected: float | None = None) -> None:
        self.deviation, self.generator, self.expected = deviation, generator, expected

    def mean(self, vector: torch.Tensor, weights: Sequence[float], start: torch.Tensor) -> torch.Tensor:
        """Add the noise.

        Raises
        ------
        ValueError
            If the weights differ: then one client could weigh more than the noise allows for.
        """
        if any(weight != 1 for weight in weights):
            raise ValueError("noise at the server needs clients that weigh 1 each")
        count = len(weights) if self.expected is None else self.expected
        noise = torch.randn(vector.shape, generator=self.generator, dtype=torch.float64) * self.deviation
        origin = start.double()
        return (origin + ((vector.double() - origin) * len(weights) + noise) / count).to(vector.dtype)


def flat(arrays: Mapping[str, torch.Tensor], shapes: Shapes) -> torch.Tensor:
    """Return the arrays of these names one after the other, on the CPU."""
    parts = [arrays[name].detach().cpu().reshape(-1) for name in shapes]
    return torch.cat(parts) if parts else torch.zeros(0)
