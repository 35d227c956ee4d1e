"""Aggregation as pure functions of tensors, in client order; streaming, it holds one sum and not a copy a client."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from flwr.app import Message

from fedlora.arrays import Arrays

_FARTHEST = 1e150
"""The square of a longer move would raise an OverflowError."""


class WeightedMean:
    """sum p_i X_i with p_i = w_i / sum w, over named arrays added one client at a time.

    The sum is kept in float64, so that the order of clients matters only below float32's rounding; it is fixed all the
    same.
    """

    def __init__(self) -> None:
        self.total_weight = 0.0
        self._sums: Arrays = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, arrays: Mapping[str, torch.Tensor], weight: float) -> None:
        """Add one client's arrays.

        Raises
        ------
        ValueError
            If the weight is negative or not finite, or names, shapes or dtypes differ from the first client's.
        """
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight {weight} is negative or not finite")
        if not self._sums:
            self._sums = {name: torch.zeros(a.shape, dtype=torch.float64) for name, a in arrays.items()}
            self._dtypes = {name: a.dtype for name, a in arrays.items()}
        if arrays.keys() != self._sums.keys():
            raise ValueError(f"names differ: {sorted(arrays.keys() ^ self._sums.keys())[:3]}")
        for name, array in arrays.items():
            if array.shape != self._sums[name].shape:
                raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {tuple(self._sums[name].shape)}")
            if array.dtype != self._dtypes[name]:
                raise ValueError(f"{name} is of {array.dtype}, expected {self._dtypes[name]}")
        sums = list(self._sums.values())
        if sums:  # a language model has no head
            torch._foreach_add_(sums, [arrays[name].double() for name in self._sums], alpha=weight)
        self.total_weight += weight

    def result(self) -> Arrays | None:
        """Return the mean in the arrays' own dtype, or None if nothing of any weight was added."""
        if self.total_weight == 0:
            return None
        return {name: (s / self.total_weight).to(self._dtypes[name]) for name, s in self._sums.items()}


class Drift:
    """How far clients move apart: sum p_i |d_i - d|^2 / |d|^2.

    d_i = X_i - X is the move of client i and d = sum p_i d_i; X is what all clients start from, and the norm runs over
    all arrays together. It is 0 where all clients agree. Streaming: it keeps sum p_i |d_i|^2, since
    sum p_i |d_i - d|^2 = sum p_i |d_i|^2 - |d|^2. Under DP the noise is part of it; it reads only what clients release.

    Parameters
    ----------
    start : mapping of str to torch.Tensor
        X.
    """

    def __init__(self, start: Mapping[str, torch.Tensor]) -> None:
        self.start = start
        self.total_weight = self._squares = 0.0

    def add(self, arrays: Mapping[str, torch.Tensor], weight: float) -> None:
        """Add one client's arrays."""
        self._squares += weight * self._square(arrays)
        self.total_weight += weight

    def result(self, mean: Mapping[str, torch.Tensor] | None) -> float | None:
        """Return the drift, given the mean of the clients' arrays; None if the mean did not move."""
        if mean is None or not self.total_weight:
            return None
        moved = self._square(mean)
        drift = self._squares / self.total_weight / moved - 1 if moved else math.nan
        # Squares of large moves may leave the range of a float.
        return max(0.0, drift) if math.isfinite(drift) else None

    def _square(self, arrays: Mapping[str, torch.Tensor]) -> float:
        # torch.dist makes no copy of the difference: less than averaging costs, for small arrays and large ones.
        moves = (float(torch.dist(array, self.start[name])) for name, array in arrays.items())
        return sum(move**2 if move < _FARTHEST else math.inf for move in moves)


def weighted_mean(clients: Iterable[tuple[Mapping[str, torch.Tensor], float]]) -> Arrays | None:
    """Weighted mean of clients' arrays, given with their weights."""
    mean = WeightedMean()
    for arrays, weight in clients:
        mean.add(arrays, weight)
    return mean.result()


def in_client_order(replies: Iterable[Message], node_ids: Sequence[int]) -> Iterator[Message]:
    """Yield replies in the order of the nodes they were asked from.

    A reply is held back only until those before it are there, so that a Grid that answers in order is streamed; those
    whose predecessors never come follow at the end, in order. There is one reply a node at most.
    """
    place = {node: i for i, node in enumerate(node_ids)}
    held: dict[int, Message] = {}
    due = 0
    for reply in replies:
        held[place.get(reply.metadata.src_node_id, len(place))] = reply
        while due in held:
            yield held.pop(due)
            due += 1
    for i in sorted(held):
        yield held[i]
