"""No correction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.corrections import Correction

if TYPE_CHECKING:
    from fedlora.arrays import Arrays


class NoCorrection(Correction):
    """Leaves gradients as they are."""

    name = "none"
    active = False

    def shift(self, own: Arrays, mean: Arrays) -> Arrays:
        """Add nothing."""
        return {}

    def after(self, own: Arrays, mean: Arrays, gradient: Arrays) -> Arrays:
        """Keep nothing."""
        return {}
