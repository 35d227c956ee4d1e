"""Carry what looks back into the coordinates of a later round, where a method's coordinates turn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from fedlora.arrays import Arrays
from fedlora.methods import Method
from fedlora.roles import kind_of

Carry = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Transport:
    """How arrays of a kind, their moves and their gradients are written in the coordinates of a later round.

    Attributes
    ----------
    basis : str
        Kind of the array, of the same module, whose rows or columns the coordinates are taken along; "" where they
        persist.
    carry : callable (array, basis before, basis after) -> array
        Linear in the array, and called in float64.
    """

    basis: str = ""
    carry: Carry = lambda array, before, after: array


PERSISTS = Transport()
"""Of a kind whose coordinates mean the same in every round."""


def along_rows(array: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Carry X, which stands in X A, from the rows of one A to those of another: X A_t A_(t+1)^T.

    With orthonormal rows this is the X' whose X' A_(t+1) is nearest to X A_t, and equal to it where both As have one
    row space; then gradients turn by the same orthogonal matrix as moves.

    Parameters
    ----------
    array : Tensor [m, r]
    before, after : Tensor [r, n]
        With orthonormal rows.
    """
    return array @ (before @ after.T)


def bases(method: type[Method], arrays: Mapping[str, torch.Tensor], head: Collection[str]) -> Arrays:
    """Return those of some arrays that a method's coordinates are relative to."""
    if method.persistent:
        return {}
    ways = [method.transport(kind_of(name, head)) for name in arrays]
    kinds = {way.basis for way in ways if way is not None}
    return {name: array for name, array in arrays.items() if kind_of(name, head) in kinds}


def carried(
    method: type[Method],
    arrays: Arrays,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    head: Collection[str],
) -> Arrays:
    """Write arrays, or moves or gradients of theirs, in other coordinates.

    Parameters
    ----------
    method : type of Method
    arrays : dict of str to Tensor
        By the names of the arrays that they belong to.
    before, after : mapping of str to Tensor
        They hold the bases, of the coordinates as they are and of the new ones.
    head : collection of str
        Names of the head's arrays.
    """
    if method.persistent:
        return dict(arrays)
    found = dict(arrays)
    for name, array in arrays.items():
        kind = kind_of(name, head)
        way = method.transport(kind)
        if way is None or not way.basis:
            continue
        basis = name.removesuffix(kind) + way.basis
        old, new = before[basis], after[basis]
        if not torch.equal(old, new):
            found[name] = way.carry(array.double(), old.double(), new.double()).to(array.dtype)
    return found


class Coordinates:
    """The coordinates of a method's arrays in one exchange.

    Parameters
    ----------
    method : type of Method
    arrays : mapping of str to Tensor
        Global arrays of the exchange.
    head : collection of str
        Names of the head's arrays.

    Attributes
    ----------
    bases : dict of str to Tensor
        What they are relative to; empty where coordinates persist.
    """

    def __init__(self, method: type[Method], arrays: Mapping[str, torch.Tensor], head: Collection[str]) -> None:
        self._method, self._head = method, head
        self.bases = bases(method, arrays, head)

    def here(self, arrays: Arrays, before: Mapping[str, torch.Tensor]) -> Arrays:
        """Write arrays, or moves of theirs, in these coordinates; ``before`` holds the bases of their own."""
        return carried(self._method, arrays, before, self.bases, self._head) if before else dict(arrays)
