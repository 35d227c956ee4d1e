"""Privacy of whole clients: their updates are clipped, summed with equal weights, and the sum gets noise.

It stands between the replies and the aggregate. A method sees the noisy mean alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fedlora import entropy
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.errors import BudgetError, InputError
from fedlora.privacy.banded import BandedNoise, band_coefficients
from fedlora.privacy.calibration import ServerPlan, spent_epsilon
from fedlora.privacy.discrete_gaussian import NoisySum
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.strategies.updates import OnlyCombined, Shapes, Update

ADAPTATION_RATE = 0.2
"""How fast the clipping norm follows the updates (Andrew et al. 2021, arXiv 1905.03871)."""


class ClientNoise:
    """Clips the updates of a run's clients, adds noise to their sums, and keeps count of what was released.

    Parameters
    ----------
    config : Config

    Attributes
    ----------
    active : bool
        Whether the run's mechanism has the server add the noise.
    norm : float
        C, to which the next update is clipped.
    releases : int
        Noisy sums that were released so far.
    by_clients : bool
        Whether clients clip and add noise themselves, under secure sums.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.active = config, mechanism_of(config).noise_by == "server"
        self.norm, self.releases = config.privacy.clipping_norm, 0
        self.plan: ServerPlan | None = None
        self.by_clients = self.active and config.privacy.noise != "central"
        self._banded = BandedNoise(band_coefficients(config.privacy.groups, config.run.rounds))
        self._clients, self._secret = 0, False
        self._spent: dict[float, int] = {}  # releases by noise multiplier, where clients add the noise

    def prepare(self, clients: int, secret: bool) -> None:
        """Calibrate the noise for this number of clients, when the run knows them.

        Parameters
        ----------
        clients : int
            N.
        secret : bool
            Whether noise comes from the operating system's entropy; else from the run's seed.

        Raises
        ------
        InputError
            If the budget cannot be kept.
        """
        if self.active:
            self.plan = mechanism_of(self.config).server_plan(self.config, clients)
            if self.plan is not None and self.plan.bands != self.config.privacy.groups:
                remedy = "is not what the mechanism accounts for; set it to"
                raise InputError("privacy.bands", self.config.privacy.bands, f"{remedy} {self.plan.bands}")
            self._clients, self._secret = clients, secret

    def turn(self, server_round: int) -> int:
        """Return the number of the release that a round makes, from 0; before a run, as if no round were repeated."""
        return self.releases if self.plan is not None else max(0, server_round - 1)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The first column of the matrix by which the noise is correlated (:mod:`fedlora.privacy.banded`)."""
        return self._banded.coefficients

    def check(self, releases: int) -> None:
        """Refuse releases that a target does not cover: repeated rounds may use up what is meant for the last ones.

        Raises
        ------
        BudgetError
        """
        if self.plan is None or self.config.privacy.target_epsilon is None:
            return
        if self.releases + releases > self.plan.releases:
            raise BudgetError(
                f"privacy.target_epsilon covers {self.plan.releases} releases, of which {self.releases} are made; "
                "rounds that were repeated used up the rest"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        spent = {"spent": list(self._spent.items())} if self.by_clients else {}
        banded = self._banded.state_dict() if self.config.privacy.groups > 1 else {}
        return {"releases": self.releases, "norm": self.norm, **spent, **banded} if self.active else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        if state:
            self.releases, self.norm = int(state["releases"]), float(state["norm"])
            self._spent = {float(sigma): int(count) for sigma, count in state.get("spent", ())}
            if self.config.privacy.groups > 1:
                self._banded.load_state_dict(state)

    def release(self, total: torch.Tensor, unclipped: int, counted: int) -> torch.Tensor:
        """Return the noisy mean of clipped updates, and let the clipping norm follow them.

        Parameters
        ----------
        total : Tensor [n]
            Their sum, in float64.
        unclipped, counted : int
            How many kept their length, and how many there were.
        """
        plan = self.plan
        assert plan is not None
        # The expected number is public, where that of the drawn clients would tell who was drawn.
        expected = plan.expected(self._clients)
        noise = self._normal(len(total) + 1)
        total = total + plan.update_noise_multiplier * self.norm * self._banded.next(noise[1:])
        self.releases += 1
        if self.config.privacy.adaptive_clipping:
            # Counted from the middle, a client changes the sum by 1/2 at most.
            share = 0.5 + (unclipped - counted / 2 + plan.count_noise * float(noise[0])) / expected
            too_many = min(1.0, max(0.0, share)) - self.config.privacy.clipping_quantile
            self.norm *= math.exp(-ADAPTATION_RATE * too_many)
        return total / expected

    def released(self, noise: NoisySum, answered: int) -> None:
        """Count a sum to which so many clients added their noise.

        Of noise that each client adds whole, one client's is counted: the others' protects it no less.
        """
        self.releases += 1
        sigma = noise.noise_multiplier(answered if self.config.privacy.noise == "distributed" else 1)
        # The last one comes last: a row tells of it.
        self._spent[sigma] = self._spent.pop(sigma, 0) + 1

    def row(self) -> dict[str, float]:
        """Return what the run has spent, by the columns of privacy.csv."""
        plan = self.plan
        assert plan is not None
        charged = plan.charged(self.releases)
        released = self._spent if self.by_clients else {plan.noise_multiplier: charged}
        spent = tuple((sigma, plan.sample_rate, count) for sigma, count in released.items())
        return {
            "steps": charged - plan.charged(self.releases - 1),
            "sample_rate": plan.sample_rate,
            "noise_multiplier": next(reversed(released)),
            "epsilon": spent_epsilon(plan.accountant, plan.delta, spent),
            "delta": plan.delta,
        }

    def _normal(self, count: int) -> torch.Tensor:
        if self._secret:
            return torch.from_numpy(entropy.normal(count))
        rng = np.random.default_rng([self.config.run.seed, self.releases, 0xC1])
        return torch.from_numpy(rng.standard_normal(count))


class NoisyUpdates(OnlyCombined):
    """The updates of a round of which only a noisy mean may be known."""

    def __init__(self, stream: Iterator[Update], start: torch.Tensor, shapes: Shapes, noise: ClientNoise) -> None:
        super().__init__(stream, start, shapes, "which privacy.mode = client does not cover")
        self._noise = noise

    def mean(self) -> Arrays:
        """Return the start plus the noisy mean of the clipped moves; noise alone where no client was drawn."""
        total, unclipped, counted = torch.zeros_like(self._from, dtype=torch.float64), 0, 0
        for move, _ in self.moves():
            length = float(move.norm())
            total += move * min(1.0, self._noise.norm / max(length, 1e-300))
            unclipped, counted = unclipped + (length <= self._noise.norm), counted + 1
        return self.moved(self._noise.release(total, unclipped, counted))
