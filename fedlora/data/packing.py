"""Several examples of a language model in one row, so that little of a batch is padding."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch

from fedlora.data.tokens import TokenTable
from fedlora.tasks import IGNORED


def packed_rows(lengths: np.ndarray, max_length: int) -> list[list[int]]:
    """Divide examples among rows of nearly one length, with the least padding that this finds.

    The longest example comes first, and each goes into the emptiest of some number of rows; all numbers are tried that
    could save something.

    Parameters
    ----------
    lengths : ndarray of int
        Of the examples, in tokens.
    max_length : int
        Longest row; at least the longest example.

    Returns
    -------
    list of list of int
        The places of each row's examples.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    longest, total = int(lengths.max(initial=0)), int(lengths.sum())
    # Each example in a row of its own.
    best, size = [[place] for place in range(len(lengths))], len(lengths) * longest
    for count in range(-(-total // max_length), len(lengths)):
        if size <= max(total, count * longest):
            break
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, row) for row in range(count)]
        for place in order:
            length, row = filled[0]
            rows[row].append(place)
            heapq.heapreplace(filled, (length + int(lengths[place]), row))
        most = max(filled)[0]
        if most <= max_length and count * most < size:
            best, size = rows, count * most
    return best


def packed_batch(table: TokenTable, rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Put examples of a language model one after the other into the rows of a batch.

    A model that attends by ``position_ids`` (transformers takes each that does not follow the one before for the start
    of another text) computes for every example what it computes for it alone.

    Parameters
    ----------
    table : TokenTable
    rows : sequence of ndarray of int
        Row numbers in the table, by row of the batch [N].

    Returns
    -------
    dict
        ``input_ids``, ``position_ids`` and ``labels``, int64 [N, T], and ``weights``, float64 [N, T]: one over the
        number of its example's target tokens. The first token of each example has no loss: the one before it is
        another's.
    """
    chosen = np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int64)
    alone = {name: value.numpy() for name, value in table.batch(chosen).items()}
    real = alone["attention_mask"].astype(bool)
    alone["labels"][:, :1] = IGNORED
    targets = (alone["labels"] != IGNORED).sum(1, keepdims=True)
    alone["position_ids"] = np.broadcast_to(np.arange(real.shape[1]), real.shape)
    alone["weights"] = np.broadcast_to(1 / np.maximum(1, targets), real.shape)
    lengths = np.array([int(table.lengths[own].sum()) for own in rows], np.int64)
    positions = np.arange(lengths.max(initial=0))
    inside = positions < lengths[:, None]
    batch = {}
    for name, padding in (("input_ids", table.pad_token_id), ("position_ids", 0), ("labels", IGNORED), ("weights", 0)):
        filled = np.full(inside.shape, padding, alone[name].dtype)
        filled[inside] = alone[name][real]
        batch[name] = torch.from_numpy(filled)
    # Padding counts on, as a part of the last example that this does not see: rows of one example need no mask.
    last = torch.from_numpy(np.maximum(0, lengths - 1))[:, None]
    beyond = torch.from_numpy(positions) - last
    if batch["position_ids"].numel():
        batch["position_ids"] += torch.where(beyond > 0, batch["position_ids"].gather(1, last) + beyond, 0)
    return batch
