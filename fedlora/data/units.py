"""Persons with several examples each (``privacy.unit``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.config import PrivacySection


def rows_by_unit(rows: np.ndarray, units: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each person, in the order of the persons' numbers; ``units`` says whose each row is."""
    order = np.argsort(units, kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(units[order])) + 1)


def at_most(units: np.ndarray, most: int, seed: list[int]) -> np.ndarray:
    """Draw up to ``most`` of each person's rows; return their places, in order.

    Which of a person's rows are drawn depends on the number of them alone: who else there is must not change it, or a
    person that leaves would change more than its own part of what is trained on.

    Parameters
    ----------
    units : ndarray of int [rows]
        Whose each row is.
    most : int
    seed : list of int
    """
    order = np.argsort(units, kind="stable")
    _, starts, counts = np.unique(units[order], return_index=True, return_counts=True)
    chosen = {count: np.random.default_rng([*seed, count]).permutation(count)[:most] for count in set(counts.tolist())}
    places = [order[start + chosen[count]] for start, count in zip(starts.tolist(), counts.tolist(), strict=True)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *places]))


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
