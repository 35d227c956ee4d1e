"""Fed-SB's client half: before the first round it sketches the gradient of the frozen layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedlora.adapters.model import linear_shape
from fedlora.adapters.parameterisations.sb import sketching_factors
from fedlora.arrays import Arrays
from fedlora.clients.half import ClientHalf
from fedlora.config import Config
from fedlora.data.tokens import TokenTable
from fedlora.training import ClientJob, ClientResult


class SketchingHalf(ClientHalf):
    """Trains R in the rounds; before them one step of B from 0, then one of A from 0, which are sketches."""

    _sketched = ""

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Take the client's rank; in a message before the first round, the width and the other factors of a sketch."""
        options: Any = self.config.method
        self._sketched = ""
        if int(settings["server-round"]):
            super().prepare(settings)
            if options.init == "federated" and "rank" not in settings:
                self.adapted.set_rank(options.rank)
            return
        shapes = {path: linear_shape(adapter.base) for path, adapter in self.adapted.adapters.items()}
        width, generator = options.sketch_width(shapes.values()), torch.Generator().manual_seed(int(settings["sketch"]))
        self.adapted.set_rank(width)
        for path, shape in shapes.items():
            factors = sketching_factors(shape, width, self.config.scaling(), generator)
            self.adapted.set_shared({f"{path}.{name}": array for name, array in factors.items()})
        self._sketched = "sb_B" if int(settings.get("exchange", 1)) == 1 else "sb_A"

    def begin(self, arrays: Arrays) -> Arrays:
        """Let what is sketched start at 0."""
        if not self._sketched:
            return arrays
        shapes = {name: self.adapted.parameter(name).shape[1:] for name in self.adapted.names([self._sketched])}
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    def train(self, table: TokenTable, jobs: Sequence[ClientJob], config: Config) -> list[ClientResult]:
        """Without privacy both sketches are of the same examples: of one matrix."""
        if self._sketched:
            jobs = [job if job.plan is not None else replace(job, exchange=1) for job in jobs]
        return super().train(table, jobs, config)
