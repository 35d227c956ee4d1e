"""Mechanisms, one file each: what is protected, who adds the noise, and what a reply says of it."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

from fedlora.config import Config
from fedlora.privacy.calibration import PrivacyPlan
from fedlora.registry import MECHANISMS


class Mechanism(ABC):
    """A unit of privacy, and how it is protected. Stateless.

    Attributes
    ----------
    name : str
        ``privacy.mode``, and the name of the file.
    unit : str
        What one record is, in the words of summary.json; "" where nothing is protected.
    noise_by : str
        Who adds the noise, and so keeps the ledger: ``client``, ``server`` or ``nobody``.
    clips_examples : bool
        Whether clients clip each example's gradient. Then examples must not depend on each other, and what training
        tells of the examples beside the arrays is not covered.
    reply_metrics : mapping of str to callable (float) -> bool
        What a reply says of what its client spent, beside its steps, and whether a number can be that.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    noise_by: ClassVar[Literal["client", "server", "nobody"]]
    clips_examples: ClassVar[bool] = False
    reply_metrics: ClassVar[Mapping[str, Callable[[float], bool]]] = {}

    @property
    def is_private(self) -> bool:
        """Whether anything is protected."""
        return self.noise_by != "nobody"

    def check(self, config: Config) -> None:
        """Refuse a config that this mechanism cannot keep.

        Raises
        ------
        InputError
        """
        return

    def plan(self, config: Config, examples: int) -> PrivacyPlan | None:
        """Return what a client of so many examples does for its privacy; None where it does nothing.

        Raises
        ------
        InputError
            If the budget cannot be kept.
        """
        return None


def get_mechanism(name: str) -> Mechanism:
    """Return the mechanism of a name; an InputError says what there is where there is none."""
    found: Mechanism = MECHANISMS.made(name)
    return found


def mechanism_of(config: Config) -> Mechanism:
    """Return the mechanism of a run."""
    return get_mechanism(config.privacy.mode)


LOCAL_SPENT: Mapping[str, Callable[[float], bool]] = {
    "noise-multiplier": lambda value: 0 <= value < math.inf,
    "sample-rate": lambda value: 0 < value <= 1,
    "epsilon": lambda value: value >= 0,
    "delta": lambda value: 0 <= value < 1,
}
"""What clients that add the noise themselves say."""
