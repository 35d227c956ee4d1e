"""Ranks of the clients' own: the keys that give them, and which rank each client has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from fedlora.config import NODES, Config, Fraction, MethodSection, Positive
from fedlora.errors import InputError

Rank = int | Literal["full"]
FULL: Literal["full"] = "full"
"""The rank of a client that trains whole matrices."""

Ranks = list[Positive | Literal["full"]] | dict[str, Positive | Literal["full"]]
"""``method.ranks``: by the clients' order, or by their names or numbers."""

_PROFILE = 7  # one stream of random numbers for each use of the run's seed


class RankedOptions(MethodSection):
    """``[method]`` of a run whose clients may have ranks of their own."""

    ranks: Ranks | None = Field(
        default=None,
        description="Rank of each client: a list in the clients' order, or a table by their names or numbers; "
        "method.rank for all by default.",
    )
    device_profile: dict[str, Fraction] | None = Field(
        default=None,
        description='Shares of the clients that have each rank, drawn by run.seed, such as {"4" = 0.5, "8" = 0.5}, '
        "instead of ranks.",
    )

    @property
    def mixed(self) -> bool:
        """Whether ranks are given."""
        return self.ranks is not None or self.device_profile is not None

    @property
    def possible_ranks(self) -> range:
        """Ranks of clients that hold leading blocks of the server's arrays; the last is that of these arrays."""
        return range(1, self.rank + 1)

    @property
    def rank_rule(self) -> str:
        """What is one of :attr:`possible_ranks`, in words."""
        return f"rank from 1 to method.rank = {self.rank}"


def ranked_options(config: Config) -> RankedOptions:
    """Return the options of a run whose clients may have ranks of their own."""
    assert isinstance(config.method, RankedOptions)
    return config.method


def has_mixed_ranks(config: Config) -> bool:
    """Whether the config gives clients ranks of their own; false for a method without such keys."""
    return isinstance(config.method, RankedOptions) and config.method.mixed


def check_ranks(config: Config) -> None:
    """Refuse ranks that are given twice, or fewer or more than the clients, and shares that do not sum to 1.

    Raises
    ------
    InputError
    """
    ranks, profile = ranked_options(config).ranks, ranked_options(config).device_profile
    if ranks is not None and profile is not None:
        raise InputError("method.ranks", ranks, "give ranks or device_profile, not both")
    if ranks is not None and not ranks:
        raise InputError("method.ranks", ranks, "is empty; give a rank for every client")
    clients = config.data.partition.clients if config.data.partition.kind != "natural" else None
    if isinstance(ranks, list) and clients is not None:
        # More nodes may come than the run waits for.
        most = math.inf if config.data.name == NODES else clients
        if not clients <= len(ranks) <= most:
            raise InputError("method.ranks", ranks, f"needs one rank for each of the {clients} clients")
    for rank in profile or ():
        if rank != FULL and not (rank.isdecimal() and int(rank) > 0):
            remedy = 'has a key that is no rank; write ranks and shares, such as {"4" = 0.5, "8" = 0.5}'
            raise InputError("method.device_profile", rank, remedy)
    if profile is not None and abs(sum(profile.values()) - 1) > 1e-6:
        raise InputError("method.device_profile", profile, "its shares must sum to 1")


def check_nested_ranks(config: Config) -> None:
    """Refuse a rank of which the server's arrays have no leading block (:attr:`RankedOptions.possible_ranks`).

    Raises
    ------
    InputError
    """
    options = ranked_options(config)
    given: dict[str, list[int | str]] = {
        "ranks": [*listed_ranks(config)],
        "device_profile": [*(options.device_profile or ())],
    }
    for key, ranks in given.items():
        for rank in ranks:
            if rank == FULL:
                remedy = f"has no use here: clients of {options.name} train factors; give a number"
                raise InputError(f"method.{key}", rank, remedy)
            check_client_rank(options, int(rank), f"method.{key}")


def check_client_rank(options: MethodSection, rank: int, field: str = "method.ranks") -> None:
    """Refuse a rank that no client of the run can have; where clients have no ranks of their own, all but one.

    Raises
    ------
    InputError
        Naming the field.
    """
    possible, rule = range(options.rank, options.rank + 1), f"rank of a client, which is method.rank = {options.rank}"
    if isinstance(options, RankedOptions):
        possible, rule = options.possible_ranks, options.rank_rule
    if rank not in possible:
        raise InputError(field, rank, f"is no {rule}; give another")


def has_rank(config: Config, client: int, name: str) -> bool:
    """Whether a client, of this number and name, has a rank; all have one unless ``method.ranks`` leaves them out."""
    ranks = ranked_options(config).ranks
    if isinstance(ranks, list):
        return client < len(ranks)
    return not isinstance(ranks, dict) or name in ranks or str(client) in ranks


def listed_ranks(config: Config) -> list[Rank]:
    """Return the ranks of ``method.ranks``, whosever they are."""
    ranks = ranked_options(config).ranks
    return list(ranks.values() if isinstance(ranks, dict) else ranks or [])


def client_ranks(config: Config, names: Sequence[str], *, complete: bool = True) -> list[Rank]:
    """Return every client's rank: from ``method.ranks``, drawn from ``method.device_profile``, or the server's.

    Parameters
    ----------
    config : Config
    names : sequence of str
        The clients' names (see :func:`~fedlora.data.partition.client_names`); a mapping of ranks may name a client so,
        or by its number.
    complete : bool
        Whether these are all clients. Else more may come, as real nodes do, and ranks are kept for them.

    Raises
    ------
    InputError
        If a client has no rank, or, where these are all clients, a rank has no client.
    """
    options = ranked_options(config)
    ranks, profile = options.ranks, options.device_profile
    if isinstance(ranks, list):
        if len(ranks) < len(names) or (complete and len(ranks) != len(names)):
            raise InputError("method.ranks", ranks, f"needs one rank for each of the {len(names)} clients")
        return ranks[: len(names)]
    if isinstance(ranks, dict):
        unknown = sorted(set(ranks) - set(names) - {str(i) for i in range(len(names))})
        if unknown and complete:
            raise InputError("method.ranks", unknown[0], f"is no client; clients: {', '.join(names)}")
        lacking = [name for i, name in enumerate(names) if not has_rank(config, i, name)]
        if lacking:
            raise InputError("method.ranks", ranks, f"has no rank for client {lacking[0]}; add it")
        return [ranks[name] if name in ranks else ranks[str(i)] for i, name in enumerate(names)]
    if profile is not None:
        kinds = sorted(profile, key=lambda rank: (rank == FULL, rank.zfill(9)))
        shares = np.array([profile[rank] for rank in kinds])
        drawn = np.random.default_rng([config.run.seed, _PROFILE]).choice(
            len(kinds), len(names), p=shares / shares.sum()
        )
        return [FULL if kinds[i] == FULL else int(kinds[i]) for i in drawn]
    return [options.possible_ranks[-1]] * len(names)
