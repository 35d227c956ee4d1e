"""Which rank each client has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.experts.expert import FULL, Rank

_PROFILE = 7  # one stream of random numbers for each use of the run's seed


def client_ranks(config: Config, names: Sequence[str]) -> list[Rank]:
    """Return every client's rank: from ``method.ranks``, drawn from ``method.device_profile``, or ``method.rank``.

    Parameters
    ----------
    config : Config
    names : sequence of str
        The clients' names (see :func:`~fedlora.data.partition.client_names`); a mapping of ranks may name a client so,
        or by its number.

    Raises
    ------
    InputError
        If a client has no rank, or a rank has no client.
    """
    ranks, profile = config.method.ranks, config.method.device_profile
    if isinstance(ranks, list):
        if len(ranks) != len(names):
            raise InputError("method.ranks", ranks, f"needs one rank for each of the {len(names)} clients")
        return list(ranks)
    if isinstance(ranks, dict):
        unknown = sorted(set(ranks) - set(names) - {str(i) for i in range(len(names))})
        if unknown:
            raise InputError("method.ranks", unknown[0], f"is no client; clients: {', '.join(names)}")
        lacking = [name for i, name in enumerate(names) if name not in ranks and str(i) not in ranks]
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
    return [config.method.rank] * len(names)
