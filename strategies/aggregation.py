"""Aggregation as pure functions of tensors, in client order; streaming, it holds one sum and not a copy a client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from flwr.app import Message

from fedlora.communication.wire import flatten

Arrays = dict[str, torch.Tensor]


class WeightedMean:
    """sum p_i X_i with p_i = w_i / sum w, over named arrays added one client at a time.

    The sum is kept in float64, so that the order of clients matters only below float32's rounding; it is fixed all the
    same.
    """

    def __init__(self) -> None:
        self.total_weight = 0.0
        self._layout: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._sum = torch.empty(0)

    def add(self, arrays: Mapping[str, torch.Tensor], weight: float) -> None:
        """Add one client's arrays.

        Raises
        ------
        ValueError
            If the weight is negative, or names or shapes differ from the first client's.
        """
        if weight < 0:
            raise ValueError(f"weight {weight} is negative")
        layout = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        flat = flatten(arrays).double()
        if not self._layout:
            self._layout, self._sum = layout, torch.zeros_like(flat)
        if layout.keys() != self._layout.keys():
            raise ValueError(f"names differ: {sorted(layout.keys() ^ self._layout.keys())[:3]}")
        for name, (shape, _) in layout.items():
            if shape != self._layout[name][0]:
                raise ValueError(f"{name} has shape {tuple(shape)}, expected {tuple(self._layout[name][0])}")
        if list(layout) != list(self._layout):
            flat = flatten({name: arrays[name] for name in self._layout}).double()
        self._sum.add_(flat, alpha=weight)
        self.total_weight += weight

    def result(self) -> Arrays | None:
        """Return the mean in the arrays' own dtype, or None if nothing of any weight was added."""
        if self.total_weight == 0:
            return None
        parts = (self._sum / self.total_weight).split([shape.numel() for shape, _ in self._layout.values()])
        return {
            name: part.reshape(shape).to(dtype)
            for (name, (shape, dtype)), part in zip(self._layout.items(), parts, strict=True)
        }


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
        self.names = list(start)
        self.start = flatten(start)
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
        return max(0.0, self._squares / self.total_weight / moved - 1) if moved else None

    def _square(self, arrays: Mapping[str, torch.Tensor]) -> float:
        if list(arrays) != self.names:
            arrays = {name: arrays[name] for name in self.names}
        # torch.dist makes no copy of the difference.
        return float(torch.dist(flatten(arrays), self.start)) ** 2


def weighted_mean(clients: Iterable[tuple[Mapping[str, torch.Tensor], float]]) -> Arrays | None:
    """Weighted mean of clients' arrays, given with their weights."""
    mean = WeightedMean()
    for arrays, weight in clients:
        mean.add(arrays, weight)
    return mean.result()


def in_client_order(replies: Iterable[Message], node_ids: Sequence[int]) -> Iterator[Message]:
    """Yield replies in the order of the nodes they were asked from.

    A reply is held back only until those before it are there, so that a Grid that answers in order is streamed; those
    whose predecessors never come follow at the end, in order.
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
