"""LocalGrid: simulated clients in the caller's own process, without Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import Message

from fedlora.capacity import Capacity
from fedlora.simulation.simulated_grid import FIRST_NODE_ID, SimulatedGrid, late_reply
from fedlora.simulation.worker import Worker


class LocalGrid(SimulatedGrid):
    """Runs simulated clients one cohort after the other in this process; takes what :class:`SimulatedGrid` takes.

    What a client process loads stays loaded for the next run in the process, and nothing has to start. The results are
    those of a RayGrid. A timeout is checked after every cohort, and does not interrupt one.
    """

    def _start(self, address: str | None, workers: int | None) -> None:
        self.num_workers = 1
        with _threads(self.cpus):
            self._worker = Worker(self.client_app, self.cpus)

    def prepare(self, known: Mapping[Any, Any]) -> None:
        """Load the app's model and data, which here is on the server's devices."""
        with _threads(self.cpus):
            self._worker.prepare(self.stored(FIRST_NODE_ID).open(), known)

    def close(self) -> None:
        """Do nothing: nothing was started."""

    def _exchange(self, messages: list[Message], deadline: float | None) -> Iterator[Message]:
        done: dict[int, Message] = {}
        due = 0
        for batch in self.batches(messages, lambda most: self._capacity(messages[0], most)):
            if deadline is not None and time.monotonic() > deadline:
                break
            chosen = [messages[i] for i in batch]
            stored = [self.stored(message.metadata.dst_node_id) for message in chosen]
            contexts = [client.open() for client in stored]
            with _threads(self.cpus), self.once:
                replies = list(self._worker.run(chosen, contexts))
            if deadline is not None and time.monotonic() > deadline:
                done.update(zip(batch, map(late_reply, chosen), strict=True))
                break
            done.update(zip(batch, replies, strict=True))
            states = [client.changed(context) for client, context in zip(stored, contexts, strict=True)]
            self.keep(chosen, states, self._worker.allowed)
            while due in done:
                yield done.pop(due)
                due += 1
        yield from (done[late] for late in sorted(done))

    def _capacity(self, message: Message, most: int) -> Capacity:
        return self._worker.measure(message, self.stored(message.metadata.dst_node_id).open(), most)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute with a worker's number of threads: the order of sums depends on it, in clients and server alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
