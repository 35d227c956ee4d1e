"""What a client remembers of its own training from round to round: moments, and variates of its correction."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ArrayRecord, Message

from fedlora.arrays import Arrays
from fedlora.clients.participant import Participant
from fedlora.communication.broadcast import group_of
from fedlora.communication.codecs import named, run_codecs
from fedlora.communication.wire import shown
from fedlora.corrections import VARIATES, correction
from fedlora.errors import InputError, StaleError
from fedlora.methods import get_method
from fedlora.roles import roles_of
from fedlora.training import ClientJob, ClientResult
from fedlora.training.optimizer_state import array_of, is_count, state_size
from fedlora.transport import Coordinates

log = logging.getLogger("fedlora")

OPTIMIZER, CORRECTION = "optimizer", "correction"
"""Sorts of what is kept."""
_BASIS = "basis"
"""Before the name of an array that the coordinates of others are relative to."""
VERSIONS = 3
"""Variates that are kept at most: those of before the round, of its last exchange that counted, and of its current."""


class Memory:
    """One client's memory in one exchange of a round.

    Parameters
    ----------
    client : Participant
        Keeps it.
    message : Message
        Of the exchange.
    there : dict of str to Tensor
        Global arrays that the client has in this exchange.
    head_names : collection of str
        Names of the head's arrays.

    Notes
    -----
    The optimiser's state is that of the client's last training, whether or not its round counted: it is a memory of
    gradients that the client has seen.

    Variates must agree with the server's mean of them, so they have versions, named by the exchange that made them. A
    message names the one that the server counts, and the client goes on from that. It keeps the one that it makes
    beside it; within a round also that of before the round, to which a round of several exchanges may go back.

    Where a method's coordinates turn, what they are relative to is kept too, and what is recalled is carried into the
    coordinates of this exchange (:mod:`fedlora.transport`).
    """

    def __init__(self, client: Participant, message: Message, there: Arrays, head_names: Collection[str]) -> None:
        self._client, self._message, self._head = client, message, head_names
        self.coordinates = Coordinates(get_method(client.config.method.name), there, head_names)
        self._keeps = client.config.client.keep_optimizer_state
        self._correction = correction(client.config)
        self._state = self._recalled(OPTIMIZER) if self._keeps else {}
        self._mean: Arrays = {}
        self._own: Arrays = {}
        self._kept: Arrays = {}

    def recall(self, job: ClientJob) -> ClientJob:
        """Return the job with what is remembered; refuse it where what it makes could not be kept.

        Raises
        ------
        InputError
            If a node's owner allows less on the disk. No example was read, and no step charged.
        StaleError
            If the message lacks the variates' mean, or its arrays are not like those that are trained.
        """
        if self._correction.active:
            self._recall_variates(job)
        if copies := self._copies():
            trained, relative = (
                sum(a.nbytes for a in arrays.values()) for arrays in (job.arrays, self.coordinates.bases)
            )
            self._client.make_room(sum(copies) * trained + len(copies) * relative)
        own = {name: self._own[name] for name in self._mean}
        state = {name: array for name, array in self._state.items() if self._fits(name, array, job.arrays)}
        return replace(job, state=state, shift=self._correction.shift(own, self._mean))

    def _copies(self) -> list[int]:
        """Return how many copies of the trained arrays each sort keeps at most, what the codec leaves out included."""
        config = self._client.config
        copies = [state_size(config.client)] if self._keeps else []
        copies += [VERSIONS] if self._correction.active else []
        # What was left out before the round, and in each of its exchanges (clients.feedback).
        copies += [1 + self._client.number] if run_codecs(config).feedback else []
        return [count for count in copies if count]

    def keep(self, job: ClientJob, result: ClientResult) -> Arrays:
        """Keep what the training left to be remembered; return the change of the variate, which is sent."""
        if result.state:
            self._keep(self._state | result.state, OPTIMIZER)
        if not self._mean:
            return {}
        own = {name: self._own[name] for name in self._mean}
        # A method may train an array in some of the steps; one that no step trained has no gradient to learn from.
        scales = {name: result.trained_steps[name] * result.learning_rate for name in self._mean}
        names = [name for name, scale in scales.items() if scale]
        moves = {n: (job.arrays[n].double() - result.arrays[n].double()) / scales[n] for n in names}
        new = self._correction.after({n: own[n] for n in names}, {n: self._mean[n] for n in names}, moves)
        new = own | {name: array.to(own[name].dtype) for name, array in new.items()}
        version = group_of(job.server_round, job.exchange)
        made = {f"{version}:{name}": array for name, array in (self._own | new).items()}
        self._keep(self._kept | made, CORRECTION)
        return {name: new[name] - own[name] for name in self._mean}

    def _keep(self, arrays: Arrays, sort: str) -> None:
        """Keep arrays named ``LABEL:NAME``, with what their coordinates are relative to."""
        self._client.keep(arrays | {f"{_BASIS}:{name}": array for name, array in self.coordinates.bases.items()}, sort)

    def _recalled(self, sort: str) -> Arrays:
        """Return what was kept of a sort, in the coordinates of this exchange."""
        kept = self._client.own(sort)
        before = {array_of(full): array for full, array in kept.items() if full.partition(":")[0] == _BASIS}
        found = {}
        for full, array in kept.items():
            label, _, name = full.partition(":")
            if label != _BASIS:
                found[full] = array if is_count(full) else self.coordinates.here({name: array}, before)[name]
        return found

    def _fits(self, name: str, array: torch.Tensor, trained: Arrays) -> bool:
        """Whether a state's array belongs to one that is trained now, and has its shape."""
        of = trained.get(array_of(name))
        return of is not None and (is_count(name) or of.shape == array.shape)

    def _recall_variates(self, job: ClientJob) -> None:
        """Read the mean, and take up the client's own variate at the version that the server counts."""
        roles = roles_of(job.arrays, self._client.exchange.roles, self._head)
        names = {name for name, role in roles.items() if role.up != "never"}
        if not names:
            return
        settings: Any = self._message.content["config"]
        record = self._message.content.get(VARIATES)
        if not isinstance(record, ArrayRecord):
            raise StaleError("the message lacks the mean of the clients' variates")
        if set(record) != names:
            remedy = f"needs clients of {self._client.config.method.name} to send what they train; use none"
            raise InputError("client.correction", self._correction.name, remedy)
        shapes = {name: tuple(job.arrays[name].shape) for name in record}
        try:
            self._mean = named(run_codecs(self._client.config).once.decode_vector(record, shapes), shapes)
        except ValueError as error:
            raise StaleError(f"the mean of the clients' variates is not like what is trained: {error}") from None
        counted = str(settings.get(VARIATES, ""))
        there = self._recalled(CORRECTION)
        self._own = {full.partition(":")[2]: a for full, a in there.items() if full.partition(":")[0] == counted}
        again = _round(counted) == job.server_round
        self._kept = {
            full: array
            for full, array in there.items()
            if (version := full.partition(":")[0]) == counted or (again and _round(version) < job.server_round)
        }
        if counted and not self._own:
            # The mean is what a variate is on average: the client adds nothing in this round.
            log.warning("the client's variate of round %s is lost; it begins anew from the mean", shown(counted))
            self._own = dict(self._mean)
        for name, mean in self._mean.items():
            if self._own.setdefault(name, torch.zeros_like(mean)).shape != mean.shape:
                raise StaleError(f"the client's variate of {name} has another shape than what is trained")


def _round(version: str) -> int:
    return int(version.partition("/")[0] or 0)
