"""FlexMoRE's client half: an owner starts and trains one expert of its own rank."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from flwr.app import ConfigRecord

from fedlora.arrays import Arrays
from fedlora.clients.half import ClientHalf
from fedlora.clients.participant import Participant
from fedlora.clients.resources import client_data
from fedlora.experts.expert_model import ExpertModel
from fedlora.experts.expert_start import start_expert


class OwnersHalf(ClientHalf):
    """Trains experts; owners of one rank share a pass."""

    adapted: ExpertModel

    def group(self, settings: Mapping[str, Any]) -> Hashable:
        """The rank."""
        return str(settings["rank"])

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Take on the rank."""
        self.adapted.prepare(settings)

    def start(self, client: Participant) -> Arrays:
        """An expert that equals the public one, its router rows from the owner's documents."""
        client.charge_start()
        sequence = None if client.secret else np.random.SeedSequence([client.config.run.seed, 0, client.client])
        return start_expert(self.adapted, client_data(client.config).train, client.rows, client.plan, sequence)

    def begin(self, arrays: Arrays) -> Arrays:
        """Take the scale out of B."""
        return self.adapted.begin(arrays)

    def finish(self, arrays: Arrays) -> Arrays:
        """Fold the scale into B; truncate where so configured."""
        return self.adapted.finish(arrays)

    def records(self) -> dict[str, ConfigRecord]:
        """The expert's rank, and which public weights it was trained beside."""
        facts = ConfigRecord({"rank": str(self.adapted.rank), "public-digest": self.adapted.public_digest})
        return {"expert": facts}
