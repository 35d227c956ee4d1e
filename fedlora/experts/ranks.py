"""Which rank each client has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.experts.expert import FULL, Rank
from fedlora.experts.options import expert_options

_PROFILE = 7  # one stream of random numbers for each use of the run's seed


def has_rank(config: Config, client: int, name: str) -> bool:
    """Whether a client, of this number and name, has a rank; all have one unless ``method.ranks`` leaves them out."""
    ranks = expert_options(config).ranks
    if isinstance(ranks, list):
        return client < len(ranks)
    return not isinstance(ranks, dict) or name in ranks or str(client) in ranks


def listed_ranks(config: Config) -> list[Rank]:
    """Return the ranks of ``method.ranks``, whosever they are."""
    ranks = expert_options(config).ranks
    return list(ranks.values() if isinstance(ranks, dict) else ranks or [])


def client_ranks(config: Config, names: Sequence[str], *, complete: bool = True) -> list[Rank]:
    """Return every client's rank: from ``method.ranks``, drawn from ``method.device_profile``, or ``method.rank``.

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
    options = expert_options(config)
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
    return [options.rank] * len(names)
