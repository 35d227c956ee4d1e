"""White-box canaries at client level: a client whose update is as long as clipping lets it be.

Every trial is a server of its own, with its own noise and its own draws of clients. Two clients are known to the
auditor: an ordinary one, and in every second trial a canary whose update has the opposite direction. Both updates are
far longer than the clipping norm. The auditor sees the noisy mean of every round.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch

from fedlora.audit.releases import Exact, Observations
from fedlora.config import Config
from fedlora.server.sampling import get_sampling
from fedlora.strategies.client_noise import ClientNoise, NoisyUpdates
from fedlora.strategies.updates import Shapes, Update

ORDINARY, CANARY = 0, 1
TIMES_TOO_LONG = (100.0, -1000.0)
"""The two updates, in multiples of the clipping norm along one direction."""


def observe_clients(config: Config, clients: int, shapes: dict[str, tuple[int, ...]], trials: int) -> Observations:
    """Let trials of a server aggregate for a whole run, and watch its noisy sums.

    Parameters
    ----------
    config : Config
        With ``privacy.mode = "client"``.
    clients : int
        N, by which the noise is calibrated.
    shapes : dict of str to tuple of int
        What a client sends.
    trials : int
        Every second one holds a canary.
    """
    plan = _prepared(config, clients, 0).plan
    assert plan is not None
    # Where a noisy count is released beside the sum, the sum's own noise is larger than that of the whole release.
    seen = Observations(plan.update_noise_multiplier, plan.sample_rate, plan.releases, trials)
    numbers = sum(math.prod(shape) for shape in shapes.values())
    direction = torch.randn(numbers, generator=torch.Generator().manual_seed(config.run.seed), dtype=torch.float64)
    direction /= direction.norm()
    exact = _exact(config, clients, direction, shapes)
    sampling = get_sampling(config.server.sampling)
    servers = [_prepared(config, clients, trial) for trial in range(trials)]
    for number in range(plan.releases):
        sums, drawn = [], []
        for trial, server in enumerate(servers):
            there = [ORDINARY, CANARY][: 1 + trial % 2]
            seed, fraction = server.config.run.seed, float(config.server.fraction_train)
            drawn.append(sampling.sample(there, number + 1, seed, fraction))
            sums.append(_sum(server, clients, drawn[-1], direction, shapes))
        here = [np.array([which in own for own in drawn]) for which in (ORDINARY, CANARY)]
        held = trials // 2
        arrays = [("update", numbers)]
        seen.add(np.arange(trials), torch.stack(sums), (here[0], here[1], trials + held), exact, arrays)
    return seen


def _prepared(config: Config, clients: int, trial: int) -> ClientNoise:
    """Make the noise of a trial, as a run of another seed has it."""
    seed = int(np.random.SeedSequence([config.run.seed, trial]).generate_state(1)[0] >> 1)
    run = config.run.model_copy(update={"seed": seed})
    made = ClientNoise(config.model_copy(update={"run": run}))
    made.prepare(clients, secret=False)
    return made


def _exact(config: Config, clients: int, direction: torch.Tensor, shapes: Shapes) -> Exact:
    """Return what sums are without noise."""
    found = []
    for drawn in ([ORDINARY], [CANARY], [ORDINARY, CANARY]):
        server = _prepared(config, clients, 0)
        assert server.plan is not None
        server.plan = dataclasses.replace(server.plan, update_noise_multiplier=0.0, count_noise=0.0)
        found.append(_sum(server, clients, drawn, direction, shapes))
    return Exact(*found)


def _sum(server: ClientNoise, clients: int, drawn: list[int], direction: torch.Tensor, shapes: Shapes) -> torch.Tensor:
    """Return the noisy sum of the drawn clients' updates, in units of the clipping norm of the round."""
    plan, norm, start = server.plan, server.norm, torch.zeros_like(direction)
    assert plan is not None
    updates = NoisyUpdates(_updates(drawn, norm * direction, shapes), start, shapes, server)
    mean = updates.mean()
    return torch.cat([mean[name].flatten() for name in shapes]) * (plan.sample_rate * clients / norm)


def _updates(drawn: list[int], unit: torch.Tensor, shapes: Shapes) -> Iterator[Update]:
    for client in drawn:
        yield Update(client, 1.0, TIMES_TOO_LONG[client] * unit, shapes)
