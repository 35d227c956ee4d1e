"""Sums of the gradients of units: of a person's examples, which physical batches may divide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedlora.adapters import RowLayout


class UnitBatch:
    """Which rows of a physical batch are of one unit, and which units go on in the next physical batch of the step.

    A unit's gradient is the mean over its rows in the step. Its rows follow each other, so that in a physical batch
    only a client's first unit may go on from the one before, and only its last into the next.

    Parameters
    ----------
    units : sequence of K ndarrays of int
        The unit of each row of a step, by client; rows of a unit follow each other.
    start, size : int
        The physical batch: of every client the rows from number ``start`` on, at most ``size``.

    Attributes
    ----------
    clients : RowLayout
        Whose each unit of the physical batch is.
    """

    def __init__(self, units: Sequence[np.ndarray], start: int, size: int) -> None:
        lengths, counts, weights = list[int](), list[int](), list[np.ndarray]()
        begun, goes_on = list[int](), list[int]()
        for client, own in enumerate(units):
            part, first = own[start : start + size], len(lengths)
            _, inverse, totals = np.unique(own, return_inverse=True, return_counts=True)
            weights.append(1 / totals[inverse[start : start + size]])
            edges = np.flatnonzero(np.diff(part)) + 1
            lengths += np.diff([0, *edges, len(part)]).tolist() if len(part) else []
            counts.append(len(lengths) - first)
            end = start + len(part)
            if len(part) and start and own[start - 1] == own[start]:
                begun.append(client)
            if len(part) and end < len(own) and own[end - 1] == own[end]:
                goes_on.append(client)
        self.clients, self._rows = RowLayout(), RowLayout()
        self.clients.set_rows(counts)
        self._rows.set_rows(lengths)
        self._weights = torch.from_numpy(np.concatenate(weights))
        ends = np.cumsum(counts)
        self._begun, self._goes_on = torch.tensor(begun, dtype=torch.long), torch.tensor(goes_on, dtype=torch.long)
        self._first = torch.from_numpy((ends - counts)[begun]).long()
        self._last = torch.from_numpy(ends[goes_on] - 1).long()

    def sums(self, sample: torch.Tensor, carried: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Add up rows by unit.

        Parameters
        ----------
        sample : Tensor [N, ...]
            Gradients of the rows.
        carried : Tensor [K, ...] or None
            Of each client's unit that goes on here, what earlier physical batches of the step added up.

        Returns
        -------
        (Tensor [U, ...], Tensor [K, ...])
            The units' gradients, as far as they are known; and what is to be carried on.
        """
        device = sample.device
        summed = self._rows.sum_rows(sample, self._weights.to(sample))
        if carried is not None and len(self._begun):
            summed[self._first.to(device)] += carried[self._begun.to(device)]
        carry = summed.new_zeros(len(self.clients.counts), *summed.shape[1:])
        carry[self._goes_on.to(device)] = summed[self._last.to(device)]
        return summed, carry

    def known(self, factors: torch.Tensor) -> torch.Tensor:
        """Return the factors [U] of the units, with 0 for those that go on."""
        factors[self._last.to(factors.device)] = 0.0
        return factors
