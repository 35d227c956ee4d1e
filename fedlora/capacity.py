"""How many clients and examples go through a model in one pass: what a worker reports to the run. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Capacity:
    """What a worker trains in one pass.

    Attributes
    ----------
    clients : int
        The most clients, at least 1.
    settings : mapping of str to Any
        Keys of the run's config, by ``section.key``, that were chosen for it.
    note : str
        What the user should know of the choice, in a line.
    """

    clients: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
