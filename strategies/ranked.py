"""Clients of unlike ranks: each holds, trains and sends the leading block of the global arrays alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays, padded
from fedlora.config import Config, MethodSection
from fedlora.data.tokens import FederatedData
from fedlora.devices import Placement
from fedlora.errors import InputError
from fedlora.ranks import RankedOptions, check_nested_ranks, check_ranks, client_ranks, has_rank
from fedlora.strategies.aggregation import WeightedMean
from fedlora.strategies.base import FederatedStrategy, Planned, Sizes
from fedlora.strategies.updates import Shapes, Update, Updates

log = logging.getLogger("fedlora")


class RankedStrategy(FederatedStrategy):
    """A method whose clients may have ranks of their own, up to the rank of the global arrays: ``method.rank``.

    A client of rank r_i holds the leading block of every factor: rows of A, columns of B, both of a square between
    them. One s = alpha / method.rank holds for all. Without ``method.ranks`` and ``method.device_profile`` nothing is
    different from :class:`~strategies.base.FederatedStrategy`.

    Notes
    -----
    Where ranks are given, :meth:`mixed_mean` averages the moves from what each client was sent, with zeros where a
    client holds nothing. Where the update is linear in what clients train, that is exactly the mean of their updates.
    The mean of padded values would shrink what small clients do not hold.

    Attributes
    ----------
    ranks : list of int
        By client; known once the model is loaded.
    """

    Options: ClassVar[type[MethodSection]] = RankedOptions
    options: RankedOptions

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.ranks: list[int] = []
        self._mixed = self.options.mixed
        self._shapes_at: Callable[[int], Shapes] = lambda rank: {}

    @classmethod
    def check(cls, config: Config) -> None:
        """Check every client's rank."""
        check_ranks(config)
        check_nested_ranks(config)

    # Who has which rank.

    def rank_of(self, client: int) -> int:
        """Return a client's rank: by default, and for a client that nobody knows, that of the global arrays."""
        known = self._mixed and 0 <= client < len(self.ranks)
        return self.ranks[client] if known else self.options.possible_ranks[-1]

    def enrol(self, names: list[str]) -> None:
        """Learn the clients' ranks by their names; real nodes may come later, and have the ranks kept for them."""
        self.ranks = [int(rank) for rank in client_ranks(self.config, names, complete=not self.names)]

    def refuses(self, client: int, name: str) -> InputError | None:
        """A node needs a rank."""
        if has_rank(self.config, client, name):
            return None
        remedy = f"has no rank for node {name}, which does not take part; add it"
        return InputError("method.ranks", self.options.ranks, remedy)

    def server_model(self, data: FederatedData, device: Placement | None = None) -> AdaptedModel:
        """Load the model; learn the clients' ranks."""
        adapted = super().server_model(data, device)
        self.enrol(self.names or data.client_names)
        return adapted

    def know(self, adapted: AdaptedModel) -> None:
        """Learn the shapes of the factors at every rank that is asked for."""
        super().know(adapted)
        if self._mixed:
            self._shapes_at = lru_cache(maxsize=None)(adapted.shapes_at)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Address the round's clients, among them nodes that came after the start."""
        if len(self.names) > len(self.ranks):
            self.enrol(self.names)
        return super().configure_train(server_round, arrays, config, grid)

    # The wire.

    def client_blocks(self, client: int) -> tuple[Hashable, Shapes] | None:
        """The factors at the client's rank, where that is below the server's."""
        if not self._mixed:
            return None
        rank = self.rank_of(client)
        return None if rank == self.options.possible_ranks[-1] else (rank, self._shapes_at(rank))

    def sizes(self, adapted: AdaptedModel) -> Sizes:
        """Those of the global arrays' rank."""
        return replace(super().sizes(adapted), rank=self.options.possible_ranks[-1])

    def client_sizes(self, sizes: Sizes, client: int) -> Sizes:
        """Those of the client's rank."""
        return replace(sizes, rank=self.rank_of(client)) if self._mixed else sizes

    def client_settings(self, client: int, server_round: int) -> dict[str, str | int | float | bool]:
        """The client's rank, where ranks are given."""
        own: dict[str, str | int | float | bool] = {"rank": self.rank_of(client)} if self._mixed else {}
        return super().client_settings(client, server_round) | own

    def planned(self, adapted: AdaptedModel) -> Planned:
        """Say the ranks too, where they are given."""
        return replace(super().planned(adapted), ranks=tuple(self.ranks) if self._mixed else ())

    # The mean.

    def moves(self, update: Update) -> Arrays:
        """Return how a client moved the arrays that it sent, of the global shapes: zero where it holds nothing."""
        before = self.sent_to(update.client)
        return {
            name: padded(array if self.role(name).up == "update" else array - before[name], self.arrays[name].shape)
            for name, array in update.arrays.items()
        }

    def aggregate(self, updates: Updates) -> Arrays | None:
        """Return the weighted mean; :meth:`mixed_mean` where ranks are given."""
        return self.mixed_mean(updates) if self._mixed else super().aggregate(updates)

    def mixed_mean(self, updates: Updates) -> Arrays | None:
        """Return the global arrays, moved by the weighted mean of the clients' moves; None where nothing came."""
        mean = WeightedMean()
        for update in updates:
            mean.add(self.moves(update), update.weight)
        moved = mean.result()
        return None if moved is None else {name: self.arrays[name] + move for name, move in moved.items()}

    def summary(self) -> None:
        """Log what runs."""
        super().summary()
        if self._mixed:
            log.info("ranks: %s", json.dumps({f"client {client}": rank for client, rank in enumerate(self.ranks)}))
