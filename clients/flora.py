"""FLoRA's client half: every round starts from factors that are drawn anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.adapters.parameterisations.lora import drawn_factors
from fedlora.arrays import Arrays
from fedlora.clients.half import ClientHalf


class FreshHalf(ClientHalf):
    """Draws A as the server says, with B = 0, beside what came."""

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Take the client's rank, and the seed of the round's draw."""
        super().prepare(settings)
        self._seed = int(settings["draw"])

    def begin(self, arrays: Arrays) -> Arrays:
        """Add the draw to the arrays that came."""
        return drawn_factors(self.adapted, self._seed) | arrays
