"""LocalGrid: simulated clients in the caller's own process, without Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import Message

from fedlora.simulation.ray_grid import FIRST_NODE_ID, RayGrid
from fedlora.simulation.worker import Worker


class LocalGrid(RayGrid):
    """Runs simulated clients one cohort after the other in this process; takes what :class:`RayGrid` takes.

    What a client process loads stays loaded for the next run in the process, and nothing has to start. The results are
    those of a RayGrid. A timeout is looked at between two cohorts.
    """

    def _start(self, address: str | None, workers: int | None) -> None:
        self._started_ray, self.num_workers = False, 1
        with _threads(self._cpus):
            self._worker = Worker(self._app, self._cpus)
        self._actors = [self._worker]

    def close(self) -> None:
        """Do nothing: nothing was started."""

    def _exchange(self, messages: list[Message], deadline: float | None) -> Iterator[Message]:
        batches, _ = self._batches(messages, {}, {})
        done: dict[int, Message] = {}
        due = 0
        for batch in batches:
            if deadline is not None and time.monotonic() > deadline:
                break
            chosen = [messages[i] for i in batch]
            contexts = [self._context(message.metadata.dst_node_id) for message in chosen]
            with _threads(self._cpus), self._once:
                done.update(zip(batch, self._worker.run(chosen, contexts), strict=True))
            for message, context in zip(chosen, contexts, strict=True):
                self.states[message.metadata.dst_node_id - FIRST_NODE_ID] = context.state
            if isinstance(self.cohort_size, int) and self._worker.limit < self.cohort_size:
                self._set_cohort_size(self._worker.limit)
            while due in done:
                yield done.pop(due)
                due += 1
        yield from (done[late] for late in sorted(done))

    def _capacity(self, message: Message, shared: Any, references: Any) -> int:
        return self._worker.measure(message, self._context(message.metadata.dst_node_id))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute with a worker's number of threads: the order of sums depends on it, in clients and server alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
