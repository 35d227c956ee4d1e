"""White-box canaries at client level: a client whose update is as long as clipping lets it be.

Every trial is a server of its own, with its own noise and its own draws of clients. Two clients are known to the
auditor: an ordinary one, and in every second trial a canary whose update has the opposite direction. Both updates are
far longer than the clipping norm. The auditor sees the noisy mean of every round.

Where noise is correlated over rounds (:mod:`fedlora.privacy.banded`), both clients have the same turns. The auditor
makes one noisy sum of each turn, which has all that the turn's releases tell, and noise of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch

from fedlora.audit.releases import Exact, Observations
from fedlora.config import Config
from fedlora.server.sampling import get_sampling, whose_turn
from fedlora.strategies.client_noise import ClientNoise, NoisyUpdates
from fedlora.strategies.updates import Shapes, Update

TIMES_TOO_LONG = (100.0, -1000.0)
"""The two updates, of the ordinary client and of the canary, in multiples of the clipping norm along one direction."""


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
    turns = plan.releases // plan.bands
    # Where a noisy count is released beside the sum, the sum's own noise is larger than that of the whole release.
    seen = Observations(plan.update_noise_multiplier, plan.sample_rate, turns, trials)
    numbers = sum(math.prod(shape) for shape in shapes.values())
    direction = torch.randn(numbers, generator=torch.Generator().manual_seed(config.run.seed), dtype=torch.float64)
    direction /= direction.norm()
    exact = _exact(config, clients, direction, shapes)
    servers = [_prepared(config, clients, trial) for trial in range(trials)]
    sampling, held = get_sampling(config.server.sampling), trials // 2
    both = range(0, 2 * plan.bands, plan.bands)  # of one group
    weights = _projection(servers[0].coefficients)
    ahead = torch.zeros(trials, numbers, dtype=torch.float64)
    for _ in range(turns):
        found, ahead, drawn = ahead, torch.zeros_like(ahead), []
        for place in range(plan.bands):
            sums = []
            for trial, server in enumerate(servers):
                there = whose_turn(both[: 1 + trial % 2], server.turn(0), plan.bands)
                seed = server.config.run.seed
                asked = sampling.sample(there, server.releases + 1, seed, plan.sample_rate)
                drawn += [asked] if place == 0 else []
                sums.append(_sum(server, clients, [both.index(client) for client in asked], direction, shapes))
            released = torch.stack(sums)
            found, ahead = found + weights[place] * released, ahead + weights[plan.bands - place] * released
        here = [np.array([which in own for own in drawn]) for which in both]
        seen.add(np.arange(trials), found, (here[0], here[1], trials + held), exact, [("update", numbers)])
    return seen


def _projection(coefficients: tuple[float, ...]) -> list[float]:
    """Return by how much a release counts for a turn so many releases before or after it, up to as many as bands.

    The releases Z have the noise C^-1 G, and C Z that of G, beside C times the updates. The projection of C Z onto a
    column of C weighs Z by the column's products with itself, shifted.
    """
    column = np.array([*coefficients, *[0.0] * len(coefficients)])
    return [float(np.dot(coefficients, column[k : k + len(coefficients)])) for k in range(len(coefficients) + 1)]


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
    for drawn in ([0], [1], [0, 1]):
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
    return torch.cat([mean[name].flatten() for name in shapes]) * (plan.expected(clients) / norm)


def _updates(drawn: list[int], unit: torch.Tensor, shapes: Shapes) -> Iterator[Update]:
    for which in drawn:
        yield Update(which, 1.0, TIMES_TOO_LONG[which] * unit, shapes)
