"""RayGrid: simulated clients in Ray actors. Strategies and clients cannot tell it from a real federation."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ray
from flwr.app import Message

from fedlora.simulation.envelope import unpack
from fedlora.simulation.ray_exchange import RayExchange
from fedlora.simulation.ray_workers import take_workers
from fedlora.simulation.simulated_grid import FIRST_NODE_ID, SimulatedGrid

if TYPE_CHECKING:
    from fedlora.shared_base import Loan

log = logging.getLogger("fedlora")


class RayGrid(SimulatedGrid):
    """Runs simulated clients in Ray actors; takes what :class:`SimulatedGrid` takes.

    Raises
    ------
    InputError
        If no worker fits, or a GPU is asked for and there is none.

    Notes
    -----
    At most a few batches a worker are under way, so that memory does not grow with the number of clients. An array
    record that several messages carry travels once a round and worker. At a timeout the workers that are late are
    replaced; the time in which workers start is not counted. What a worker had under way when it was killed runs
    again. Workers on the GPUs of this process use the base model that it has loaded.
    """

    def _start(self, address: str | None, workers: int | None) -> None:
        self._loans: list[Loan] = []
        self.reply_bytes: dict[str, int] = {}  # of the largest reply so far, by the type of its message
        self._workers = take_workers(self.client_app, workers, self.cpus, self.gpus, address)
        self.num_workers = len(self.actors)

    @property
    def actors(self) -> list[Any]:
        """The workers."""
        return self._workers.actors

    def prepare(self, known: Mapping[Any, Any]) -> None:
        """Have every worker load the app's model and data; the first messages wait behind it."""
        self._lend()
        shared = known if self._workers.here else {}
        self._workers.prepare(self.stored(FIRST_NODE_ID).open(), shared)

    def close(self) -> None:
        """End the workers, and Ray if this grid started it."""
        self._workers.close()
        if self._loans:
            from fedlora.shared_base import end_loans

            end_loans(self._loans)
            self._loans = []

    def replace_worker(self, worker: int, *, kill: bool) -> None:
        """Replace a worker that has ended, or end it first."""
        started = self._workers.replace(worker, kill=kill)
        if self._loans:
            started.borrow.remote(self._loans)

    def read(self, messages: list[Message], reference: Any, chosen: list[int]) -> list[Message]:
        """Read the replies to these messages, keep their clients' states, and pass on the worker's warnings.

        Parameters
        ----------
        messages : list of Message
        reference : ray.ObjectRef
        chosen : list of int
            Of which messages, by their places among these, replies and states are taken.

        Raises
        ------
        ray.exceptions.RayError
            If the worker ended.
        """
        envelopes, states, allowed = ray.get(reference)
        kind = messages[0].metadata.message_type
        self.reply_bytes[kind] = max(self.reply_bytes.get(kind, 0), *(envelope.array_bytes for envelope in envelopes))
        with self.once:
            for note in itertools.chain.from_iterable(envelope.notes for envelope in envelopes):
                log.warning("%s", note)
        self.keep([messages[k] for k in chosen], [states[k] for k in chosen], allowed)
        return [unpack(envelopes[k]) for k in chosen]

    def _exchange(self, messages: list[Message], deadline: float | None) -> Iterator[Message]:
        self._lend()
        yield from RayExchange(self, messages, deadline).replies()

    def starting(self) -> bool:
        """Whether a worker is starting."""
        return self._workers.starting()

    def doing(self) -> str:
        """Describe what the workers do."""
        return self._workers.doing()

    def _lend(self) -> None:
        """Tell the workers on this process' GPUs, once, of the base model that it has loaded."""
        if self.gpus and not self._loans:
            from fedlora.shared_base import lend

            self._loans = lend()
            for actor in self.actors if self._loans else ():
                actor.borrow.remote(self._loans)
