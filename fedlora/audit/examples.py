"""White-box canaries at example or user level: an example or a person whose part is as long as clipping lets it be.

Every trial is a client of a cohort, with its own noise and its own sampling, trained by the run's own client half. It
holds an ordinary example; every second one holds a canary beside it: the same text with another label, so that the two
pull in opposite directions, and what should be clipped one by one but is not shows. A person is a canary of as many
such examples as a person of the data may have, all alike, so that what should be clipped as one but is not shows too.
All losses are weighted until their gradients are far longer than C. The learning rate is 0: the auditor chooses what
every round starts from, as a server may, and the sums without noise are the same in all steps. What the optimiser is
handed in each step, noised and averaged, is what the auditor sees: DP-SGD's guarantee covers all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedlora.audit.releases import Exact, Observations
from fedlora.clients.half import ClientHalf, client_half
from fedlora.clients.resources import client_data
from fedlora.config import Config
from fedlora.data.tokens import FederatedData, TokenTable
from fedlora.errors import GuardError, InputError
from fedlora.methods import get_method
from fedlora.privacy import PrivacyPlan
from fedlora.privacy.calibration import local_steps
from fedlora.roles import kind_of, trained_kinds
from fedlora.training import ClientJob, StepRule

ORDINARY, CANARY = 0, 1
TIMES_TOO_LONG = (100.0, 1000.0)
"""How many times C the gradients of the two examples are, before clipping."""
_NUMBERS = 2**24
_MOST = 500
"""A cohort has so many clients at most, and its trained arrays so many numbers."""

Sink = Callable[[int, list[torch.Tensor]], None]


class PairTable(TokenTable):
    """An ordinary example, then those of a canary, again for every trial.

    The ordinary example of trial k is of unit 2 k, its canary of unit 2 k + 1.

    Parameters
    ----------
    table : TokenTable
        Where they are taken from.
    trials : int
    size : int
        Examples of a canary.

    Attributes
    ----------
    weights : ndarray [2]
        Of the losses of the two units.
    drawn : list of ndarray
        Rows of the batches since it was last emptied.
    """

    def __init__(self, table: TokenTable, trials: int, size: int = 1) -> None:
        self._table, self._stride = table, 1 + size
        self._rows, self._labels = _pair(table)
        task: Any = copy(table.task)
        task.loss = self._loss
        vars(self).update(vars(table))
        self.task = task
        pair = np.minimum(np.arange(self._stride), 1)
        self.lengths = np.tile(table.lengths[self._rows[pair]], trials)
        self.units = (2 * np.arange(trials)[:, None] + pair).ravel()
        self.weights, self.drawn = np.ones(2), list[np.ndarray]()

    def batch(self, rows: np.ndarray | Sequence[int], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """Return rows as the table does, the canary with its own label."""
        rows = np.asarray(rows, np.int64)
        self.drawn.append(rows)
        which = self._which(rows)
        found = self._table.batch(self._rows[which], device)
        if self._labels is not None:
            found["labels"] = torch.from_numpy(self._labels[which]).to(found["labels"])
        return found

    def rows(self, trial: int, unit: int) -> np.ndarray:
        """Return a trial's rows: those of :data:`ORDINARY` or :data:`CANARY`."""
        own = np.arange(trial * self._stride, (trial + 1) * self._stride)
        return own[1:] if unit == CANARY else own[:1]

    def came(self, members: np.ndarray) -> list[np.ndarray]:
        """Count the rows of both units that came for each of these trials since the last call; forget them."""
        rows = np.concatenate([np.empty(0, np.int64), *self.drawn])
        self.drawn.clear()
        here, which = rows // self._stride - members[0], self._which(rows)
        return [np.bincount(here[which == unit], minlength=len(members)) for unit in (ORDINARY, CANARY)]

    def _which(self, rows: np.ndarray) -> np.ndarray:
        return np.minimum(rows % self._stride, 1)

    def _loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        loss = self._table.task.loss(outputs, labels)
        return loss * torch.from_numpy(self.weights[self._which(self.drawn[-1])]).to(loss)


def _canary_size(data: FederatedData, plan: PrivacyPlan) -> int:
    """Return how many examples a canary has: one, or as many as a person has at most."""
    if not plan.samples_units:
        return plan.group
    units = data.train.units
    assert units is not None
    return max(int(np.unique(units[rows], return_counts=True)[1].max()) for rows in data.partition)


def _pair(table: TokenTable) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the rows of both examples, and labels if they are of one text."""
    if table.label_names is not None and len(table.label_names) > 1 and table.labels is not None:
        labels = np.array(table.labels[[0, 0]])
        if labels.ndim == 1 and labels.dtype.kind == "i":
            return np.zeros(2, np.int64), (labels + np.array([ORDINARY, CANARY])) % len(table.label_names)
    return np.array([0, min(1, len(table) - 1)]), None


class _Watch(StepRule):
    """A method's rule that passes on what each step hands to the optimiser."""

    def __init__(self, rule: StepRule, sink: Sink) -> None:
        self._rule, self._sink = rule, sink
        self._step, self._awaited, self._seen = -1, 0, list[torch.Tensor]()

    def trains(self, kind: str, step: int) -> bool:
        """Say what the method's rule says."""
        if step != self._step:
            self._step, self._awaited, self._seen = step, 0, []
        trained = self._rule.trains(kind, step)
        self._awaited += trained
        return trained

    def gradient(self, kind: str, gradient: torch.Tensor) -> torch.Tensor:
        """Take note of a gradient; it is all of them once every trained array's came."""
        self._seen.append(gradient.detach().flatten(1))
        if len(self._seen) == self._awaited:
            self._sink(self._step, self._seen)
        return self._rule.gradient(kind, gradient)


@dataclass
class _Round:
    """One round of the audit: what is trained, from what."""

    number: int
    half: ClientHalf
    table: PairTable
    config: Config
    arrays: dict[str, torch.Tensor]
    rule: StepRule

    def run(self, members: Sequence[int], rows: Sequence[np.ndarray], plan: PrivacyPlan, sink: Sink) -> None:
        """Train clients of these numbers on rows of the pair table, and pass on their steps."""
        jobs = [
            ClientJob(member, self.number, own, self.arrays, 0.0, plan)
            for member, own in zip(members, rows, strict=True)
        ]
        self.half.rule = _Watch(self.rule, sink)
        try:
            self.half.train(self.table, jobs, self.config)
        finally:
            self.half.rule = self.rule

    def sums(self, plan: PrivacyPlan) -> list[list[torch.Tensor]]:
        """Return the sums of each step, without noise: of the ordinary example, of all the canary's, and of both.

        Each is made in a pass of its own, so that what mixes the rows of a pass shows.
        """
        bare = replace(plan, noise_multiplier=0.0, sample_rate=1.0, expected_batch_size=1.0)
        found: list[list[torch.Tensor]] = []
        ordinary, canary = self.table.rows(0, ORDINARY), self.table.rows(0, CANARY)
        for rows in (ordinary, canary, np.concatenate([ordinary, canary])):
            steps: list[torch.Tensor] = []

            def take(_: int, parts: list[torch.Tensor], steps: list[torch.Tensor] = steps) -> None:
                steps.append(torch.cat(_at_home(parts), 1)[0])

            self.run([0], [rows], bare, take)
            if not steps:
                remedy = "has clients that train in a way that cannot be watched; choose another method"
                raise InputError("method.name", self.config.method.name, remedy)
            found.append(steps)
        return [list(step) for step in zip(*found, strict=True)]

    def layout(self, step: int) -> list[tuple[str, int]]:
        """Return kind and size of the arrays that a step trains."""
        adapted = self.half.adapted
        named = [(kind_of(name, adapted.head_names), adapted.parameter(name)[0].numel()) for name in adapted.trained]
        return [(kind, size) for kind, size in named if self.rule.trains(kind, step)]


def observe_examples(
    config: Config, settings: Callable[[int], Mapping[str, Any]], plan: PrivacyPlan, examples: int, trials: int
) -> Observations:
    """Let trials of a client with such a plan train for a whole run, and watch its noisy sums.

    Parameters
    ----------
    config : Config
        Resolved, with ``privacy.mode = "example"``.
    settings : callable (int) -> mapping
        What the server tells a client in a round.
    plan : PrivacyPlan
        The client's.
    examples : int
        n, of how many examples, or persons, the client's steps draw.
    trials : int
        Every second one holds a canary.

    Returns
    -------
    Observations

    Raises
    ------
    InputError
        If the model's examples depend on each other, or the method's clients do not train by gradients that are noised.
    GuardError
        If the canary has no gradient.
    """
    half, method, data = client_half(config), get_method(config.method.name), client_data(config)
    table = PairTable(data.train, trials, _canary_size(data, plan))
    seen = Observations(plan.noise_multiplier, plan.sample_rate, plan.steps, trials, plan.group)
    for server_round in range(1, config.run.rounds + 1):
        half.prepare(settings(server_round))
        for exchange in method.exchanges(config, server_round):
            chosen = exchange.training(config)
            part = _prepare(_plain(chosen, local_steps(chosen, examples)), half, table, server_round, exchange.roles)
            _watch_round(part, plan, trials, seen)
    return seen


def _plain(config: Config, steps: int) -> Config:
    """Return the config by which trials train: the client's steps, and nothing drawn but noise and samples."""
    client = config.client.model_copy(
        update={"local_steps": steps, "local_epochs": None, "keep_optimizer_state": False, "optimizer": "sgd"}
    )
    method = config.method.model_copy(update={"dropout": 0.0})
    return config.model_copy(update={"client": client, "method": method})


def _prepare(config: Config, half: ClientHalf, table: PairTable, server_round: int, roles: Any) -> _Round:
    adapted = half.adapted
    drawn = adapted.drawn(server_round)
    adapted.set_shared(drawn)
    arrays = half.begin({name: drawn[name] for name in adapted.names(trained_kinds(roles))})
    return _Round(server_round, half, table, config, arrays, half.rule)


def _watch_round(part: _Round, plan: PrivacyPlan, trials: int, seen: Observations) -> None:
    """Find out what sums are without noise, then watch those of all trials, a cohort at a time."""
    clip, table = plan.max_grad_norm, part.table
    table.weights = np.ones(2)
    unclipped = part.sums(replace(plan, max_grad_norm=1e6))[0]
    lengths = np.array([float(total.norm()) for total in unclipped[:2]])
    if not lengths.all():
        raise GuardError("an example has no gradient at the start that was drawn, so that nothing can be audited")
    table.weights = np.array(TIMES_TOO_LONG) * clip / lengths
    exact = [Exact(*(total / clip for total in step)) for step in part.sums(plan)]
    most = len(table.rows(0, CANARY))
    at_once = min(most, part.config.client.physical_batch_size or most)
    size = max(1, min(_MOST, _NUMBERS // (at_once * len(exact[0].both))))
    for first in range(0, trials, size):
        members = np.arange(first, min(first + size, trials))
        units = [[ORDINARY, CANARY][: 1 + k % 2] for k in members.tolist()]
        rows = [
            np.concatenate([table.rows(k, unit) for unit in own])
            for k, own in zip(members.tolist(), units, strict=True)
        ]
        chances = sum(map(len, units if plan.samples_units else rows))

        def take(step: int, parts: list[torch.Tensor], members: np.ndarray = members, chances: int = chances) -> None:
            ordinary, held = table.came(members)
            held = np.minimum(held, 1) if plan.samples_units else held
            sums = torch.cat(_at_home(parts), 1) * (plan.expected_batch_size / clip)
            seen.add(members, sums, (ordinary > 0, held, chances), exact[step], part.layout(step))

        table.drawn.clear()
        part.run(members.tolist(), rows, plan, take)


def _at_home(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Bring the parts of a split model to one device."""
    return [part.to(parts[0].device) for part in parts]
