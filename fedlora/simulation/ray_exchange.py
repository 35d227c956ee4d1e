"""One exchange of messages with Ray's workers: batches that wait, that are under way, and that are done."""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from flwr.app import ArrayRecord, Error, Message

from fedlora.errors import ClientErrorCode
from fedlora.simulation.envelope import SharedRecord, pack, pack_record

if TYPE_CHECKING:
    from fedlora.simulation.ray_grid import RayGrid

PART = 16
"""Replies that are fetched at once: the driver reads and sums the first while the worker encodes the others."""

QUEUED = 2
"""Batches in flight for each worker, so that it does not wait for the driver between two of them."""


@dataclass(frozen=True)
class _Part:
    """Replies that are under way, from one worker to some messages of a batch; ``places`` are their indices."""

    worker: int
    batch: int
    places: list[int]
    last: bool


class RayExchange:
    """Hands messages to a grid's workers and yields the replies in the messages' order.

    Parameters
    ----------
    grid : RayGrid
    messages : list of Message
    """

    def __init__(self, grid: RayGrid, messages: list[Message]) -> None:
        self.grid, self.messages = grid, messages
        self.shared, self.references = _share_records(messages)
        self.batches = grid.batches(messages, self._capacity)
        self.waiting = deque(range(len(self.batches)))
        # In order, no more than a window of replies is held; else the first message may be in the last batch.
        places = itertools.pairwise(itertools.chain.from_iterable(self.batches))
        in_order = all(i <= j for i, j in places)
        self.window = 2 * QUEUED * len(grid.actors) if in_order else len(self.batches)
        self.running: dict[Any, _Part] = {}  # by reference, in the order of submission
        self.done: dict[int, Message] = {}
        self.due = 0

    def replies(self, deadline: float | None) -> Iterator[Message]:
        """Yield the replies; those missing at the deadline are given up, and their workers replaced."""
        while self.due + len(self.done) < len(self.messages):
            self._submit()
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait(list(self.running), num_returns=1, timeout=left)
            if not ready:
                for late in {part.worker for part in self.running.values()}:
                    self.grid.replace_worker(late, kill=True)
                break
            self._receive(self.running[ready[0]].worker)
            while self.due in self.done:
                yield self.done.pop(self.due)
                self.due += 1
        for place in sorted(self.done):
            yield self.done[place]

    def _submit(self) -> None:
        """Hand waiting batches to the workers with the fewest batches."""
        load = Counter(part.worker for part in self.running.values() if part.last)
        while self.waiting and self.waiting[0] < self.due // len(self.batches[0]) + self.window:
            worker = min(range(len(self.grid.actors)), key=lambda w: (load[w], w))
            if load[worker] >= QUEUED:
                break
            load[worker] += 1
            batch = self.waiting.popleft()
            places = self.batches[batch]
            for start, reference in zip(range(0, len(places), PART), self._send(places, worker), strict=True):
                last = start + PART >= len(places)
                self.running[reference] = _Part(worker, batch, places[start : start + PART], last)

    def _send(self, places: list[int], worker: int) -> list[Any]:
        """Hand a batch to a worker; return a reference for each part of its replies."""
        batch = [self.messages[i] for i in places]
        envelopes = [pack(message, self.shared) for message in batch]
        wanted = {r.key for e in envelopes for r in (e.records or {}).values() if isinstance(r, SharedRecord)}
        contexts = [self.grid.context(message.metadata.dst_node_id) for message in batch]
        actor = self.grid.actors[worker]
        first = actor.handle.remote(envelopes, contexts, {key: self.references[key] for key in wanted}, PART)
        return [first, *(actor.more.remote(PART) for _ in range(PART, len(batch), PART))]

    def _receive(self, worker: int) -> None:
        """Read a worker's next replies."""
        # It answers in order, but its death shows on all its batches at once: the oldest is the fatal one.
        reference = next(ref for ref, part in self.running.items() if part.worker == worker)
        part = self.running.pop(reference)
        chosen = [self.messages[i] for i in part.places]
        try:
            replies = self.grid.read(chosen, reference)
        except ray.exceptions.RayError as error:
            replies = [_died(message, error) for message in chosen]
            if isinstance(error, ray.exceptions.RayActorError):
                self._bury(part, error)
        self.done.update(zip(part.places, replies, strict=True))

    def _bury(self, fatal: _Part, error: Exception) -> None:
        """Replace the worker that ended; the batches that were queued behind the fatal one go to the new worker."""
        for reference, part in [(ref, part) for ref, part in self.running.items() if part.worker == fatal.worker]:
            del self.running[reference]
            if part.batch == fatal.batch:
                self.done.update((i, _died(self.messages[i], error)) for i in part.places)
            elif part.last:
                self.waiting.append(part.batch)
        self.waiting = deque(sorted(self.waiting))
        self.grid.replace_worker(fatal.worker, kill=False)

    def _capacity(self) -> int:
        message = self.messages[0]
        context = self.grid.context(message.metadata.dst_node_id)
        measured = self.grid.actors[0].capacity.remote(pack(message, self.shared), context, self.references)
        return int(ray.get(measured))


def _share_records(messages: list[Message]) -> tuple[dict[int, SharedRecord], dict[int, list[Any]]]:
    """Put every array record that more than one message carries into Ray's object store once."""
    records = {}
    uses: Counter[int] = Counter()
    for message in messages:
        for record in message.content.values():
            if isinstance(record, ArrayRecord):
                records[id(record)] = record
                uses[id(record)] += 1
    shared, references = {}, {}
    for identity, count in uses.items():
        if count > 1:
            # A key of its own for every exchange: ids of dead objects come again.
            key = next(_SHARED_KEYS)
            shared[identity] = SharedRecord(key)
            references[key] = [ray.put(pack_record(records[identity]))]
    return shared, references


_SHARED_KEYS = itertools.count()


def _died(message: Message, error: Exception) -> Message:
    reason = f"the worker of this client ended: {type(error).__name__}: {error}"
    return Message(Error(code=ClientErrorCode.WORKER_DIED, reason=reason), reply_to=message)
