"""RayGrid: simulated clients in Ray actors. Strategies and clients cannot tell it from a real federation."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
from flwr.app import Message

from fedlora.errors import InputError
from fedlora.simulation.envelope import unpack
from fedlora.simulation.placement import count_free, count_workers
from fedlora.simulation.ray_cluster import start_ray
from fedlora.simulation.ray_exchange import RayExchange
from fedlora.simulation.simulated_grid import SimulatedGrid
from fedlora.simulation.worker import Worker

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
        self.actors: list[Any] = []
        self._loans: list[Loan] = []
        self._starting: list[Any] = []
        self._started_ray = start_ray(address)
        try:
            self.num_workers = count_workers(workers, self.cpus, self.gpus)
            if not self._started_ray:
                self.num_workers = count_free(self.num_workers, workers, self.cpus, self.gpus, _held())
        except InputError as error:
            self.close()
            if self._started_ray:
                raise
            remedy = f"{error.remedy}; this is a Ray that runs already: give it more, or end it with ray.shutdown()"
            raise InputError(error.field, error.value, remedy) from None
        self.actors = [self._start_worker() for _ in range(self.num_workers)]
        _OPEN.add(self)

    def close(self) -> None:
        """End the workers, and Ray if this grid started it."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
        _OPEN.discard(self)
        if self._loans:
            from fedlora.shared_base import end_loans

            end_loans(self._loans)
            self._loans = []
        if self._started_ray:
            ray.shutdown()

    def replace_worker(self, worker: int, *, kill: bool) -> None:
        """Replace a worker that has ended, or end it first."""
        if kill:
            ray.kill(self.actors[worker])
        self.actors[worker] = self._start_worker()

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
        envelopes, states, limit = ray.get(reference)
        with self.once:
            for note in itertools.chain.from_iterable(envelope.notes for envelope in envelopes):
                log.warning("%s", note)
        self.keep([messages[k] for k in chosen], [states[k] for k in chosen], limit)
        return [unpack(envelopes[k]) for k in chosen]

    def _exchange(self, messages: list[Message], deadline: float | None) -> Iterator[Message]:
        if self.gpus and not self._loans:
            from fedlora.shared_base import lend

            self._loans = lend()
            for actor in self.actors if self._loans else ():
                actor.borrow.remote(self._loans)
        yield from RayExchange(self, messages, deadline).replies()

    def starting(self) -> bool:
        """Whether a worker is starting."""
        if self._starting:
            # One that ended meanwhile is found by whoever asks it.
            _, self._starting = ray.wait(self._starting, num_returns=len(self._starting), timeout=0)
        return bool(self._starting)

    def _start_worker(self) -> Any:
        actor = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus)(Worker)
        started: Any = actor.remote(self.client_app, self.cpus)
        self._starting.append(started.ready.remote())
        if self._loans:
            started.borrow.remote(self._loans)
        return started


def _held() -> tuple[float, float]:
    """CPUs and GPUs that the open grids of this process hold."""
    return sum(grid.num_workers * grid.cpus for grid in _OPEN), sum(grid.num_workers * grid.gpus for grid in _OPEN)


_OPEN: weakref.WeakSet[RayGrid] = weakref.WeakSet()
