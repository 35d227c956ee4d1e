"""The server's half of a correction: the mean of all clients' variates, and which of its own each client is at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, Message

from fedlora.arrays import Arrays
from fedlora.communication.codecs import named, run_codecs
from fedlora.config import Config
from fedlora.corrections import VARIATES, correction
from fedlora.strategies.replies import read_beside
from fedlora.strategies.updates import Shapes


class Variates:
    """Keeps the weighted sum of the clients' variates (:mod:`fedlora.corrections`), and sends its mean.

    A client's variate counts once its reply does. A message therefore names the reply that gave the variate which the
    server counts for that client, and the client goes on from that one: what it made in a round that does not count, or
    whose reply was lost, is dropped on both sides.

    Parameters
    ----------
    config : Config

    Attributes
    ----------
    active : bool
        Whether the run has variates.
    sums : dict of str to Tensor, float64
        sum w_i v_i over all clients.
    versions : dict of int to str
        By client, the exchange whose reply gave v_i; a client that is not there has v_i = 0.
    """

    def __init__(self, config: Config) -> None:
        self.active = correction(config).active
        # Lossless: rounded changes would not add up to the clients' variates.
        self._codec = run_codecs(config).once
        self.sums: Arrays = {}
        self.versions: dict[int, str] = {}
        self._change = torch.zeros(0)
        self._answered: list[int] = []

    def payload_bytes(self, shapes: Shapes) -> int:
        """Return the bytes that variates of these arrays add to a message, and to its reply."""
        return sum(map(self._codec.payload_bytes, shapes.values())) if self.active else 0

    def record(self, shapes: Shapes, weight: float) -> dict[str, ArrayRecord]:
        """Return what a message holds of the mean, given the weight of all clients together; and begin an exchange."""
        self._answered = []
        if not self.active or not shapes:
            return {}
        self._change = torch.zeros(sum(map(math.prod, shapes.values())), dtype=torch.float64)
        mean = {name: self._sum(name, shape) / weight for name, shape in shapes.items()}
        return {VARIATES: self._codec.encode(mean)}

    def settings(self, client: int) -> dict[str, str]:
        """Return what a message says of the client's own variate."""
        return {VARIATES: self.versions.get(client, "")} if self.active else {}

    def read(self, message: Message, shapes: Shapes) -> torch.Tensor | None:
        """Return the change of a client's variate, as one vector.

        Raises
        ------
        ReplyError
        """
        return read_beside(message, VARIATES, shapes, self._codec) if self.active and shapes else None

    def add(self, client: int, weight: float, change: torch.Tensor | None) -> None:
        """Take a client's change; it counts once the exchange does."""
        if change is not None:
            self._change += weight * change.double()
            self._answered.append(client)

    def count(self, group: str, shapes: Shapes) -> None:
        """Let the changes of an exchange count."""
        if self._answered:
            for name, change in named(self._change, shapes).items():
                self.sums[name] = self._sum(name, shapes[name]) + change
            self.versions |= dict.fromkeys(self._answered, group)

    def turn(self, carry: Callable[[Arrays], Arrays]) -> None:
        """Write the sums in other coordinates."""
        self.sums = carry(self.sums)

    def _sum(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.sums[name] if name in self.sums else torch.zeros(shape, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Return sums and versions."""
        return {"sums": self.sums, "versions": {str(c): version for c, version in self.versions.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.sums = dict(state.get("sums", {}))
        self.versions = {int(client): version for client, version in state.get("versions", {}).items()}
