"""Persons with several examples each (``privacy.unit``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.config import PrivacySection


def at_most(units: np.ndarray, most: int, seed: list[int]) -> np.ndarray:
    """Draw up to ``most`` of each person's rows; return their places, in order.

    Parameters
    ----------
    units : ndarray of int [rows]
        Whose each row is.
    most : int
    seed : list of int
    """
    order = np.random.default_rng(seed).permutation(len(units))
    order = order[np.argsort(units[order], kind="stable")]  # by person, at random within
    _, starts, counts = np.unique(units[order], return_index=True, return_counts=True)
    return np.sort(order[np.arange(len(order)) - np.repeat(starts, counts) < most])


def unit_notes(privacy: PrivacySection, units: np.ndarray, partition: Sequence[np.ndarray]) -> list[str]:
    """Say how the persons' examples are spread, where persons are protected."""
    if not privacy.protects_units:
        return []
    members = [np.unique(units[rows]) for rows in partition]
    sizes = np.bincount(units[np.concatenate([np.empty(0, np.int64), *partition])])
    sizes = sizes[sizes > 0]
    middle = f"the median has {np.median(sizes):g} examples, the largest {sizes.max():,}"
    notes = [f"{privacy.unit} names {len(sizes):,} persons; {middle}"]
    several = np.count_nonzero(np.bincount(np.concatenate(members)) > 1)
    if several:
        notes.append(
            f"{several:,} of {len(sizes):,} persons have examples at several clients; epsilon is that of one client's "
            "examples of a person"
        )
    return notes
