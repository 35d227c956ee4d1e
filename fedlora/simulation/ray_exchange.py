"""One exchange of messages with Ray's workers: batches that wait, that are under way, and that are done."""

from __future__ import annotations

import itertools
import pickle
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from flwr.app import ArrayRecord, Error, Message

from fedlora.errors import ClientErrorCode
from fedlora.simulation.envelope import SharedRecord, StoredContext, pack, pack_record
from fedlora.simulation.simulated_grid import late_reply

if TYPE_CHECKING:
    from fedlora.capacity import Capacity
    from fedlora.simulation.ray_grid import RayGrid

PART = 16
"""Replies at least that are fetched at once: the driver reads the first while the worker encodes the others."""

PART_BYTES, MOST = 2**24, 64
"""As many as have so many bytes are fetched at once, and so many at most: a part costs a millisecond."""

DEATHS = 3
"""So many workers may end on a message until its client is given up: it may be what ends them."""

MOST_STARTING = 600.0
"""Seconds in an exchange for which a deadline waits for workers to start."""

AHEAD = 256
"""So many batches beyond the one that is due an idle worker may begin; their replies are held until then."""

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

    A batch on which a worker ends runs again, as a whole and from the states that it began with, so that its replies
    are those that the first worker would have given. Where workers keep ending on it, its clients run alone.

    Parameters
    ----------
    grid : RayGrid
    messages : list of Message
    deadline : float, optional
        Of :func:`time.monotonic`; it moves by the time in which workers start.
    """

    def __init__(self, grid: RayGrid, messages: list[Message], deadline: float | None) -> None:
        self.grid, self.messages = grid, messages
        self.deadline, self.checked, self.starting_seconds = deadline, time.monotonic(), 0.0
        self.shared, self.references = _share_records(messages)
        self.part = part_size(grid.reply_bytes.get(messages[0].metadata.message_type) if messages else None)
        self.batches = grid.batches(messages, self._capacity)
        self.waiting = deque(range(len(self.batches)))
        # In order, no more than a window of replies is held; else the first message may be in the last batch.
        places = itertools.pairwise(itertools.chain.from_iterable(self.batches))
        in_order = all(i <= j for i, j in places)
        self.window = 2 * QUEUED * len(grid.actors) if in_order else len(self.batches)
        self.running: dict[Any, _Part] = {}  # by reference, in the order of submission
        self.contexts: dict[int, list[StoredContext]] = {}  # of batches that were sent
        self.deaths: Counter[int] = Counter()  # by batch
        self.answered: set[int] = set()  # places
        self.done: dict[int, Message] = {}
        self.due = 0

    def replies(self) -> Iterator[Message]:
        """Yield the replies; what is under way at the deadline is late, and its workers are replaced."""
        while self.due + len(self.done) < len(self.messages):
            self._submit()
            ready, _ = ray.wait(list(self.running), num_returns=1, timeout=self._patience())
            if not ready and self._patience() == 0:
                for late in {part.worker for part in self.running.values()}:
                    self.grid.replace_worker(late, kill=True)
                for part in self.running.values():
                    self._answer(part.places, [late_reply(self.messages[i]) for i in part.places])
                break
            if not ready:
                continue
            self._receive(self.running[ready[0]].worker)
            while self.due in self.done:
                yield self.done.pop(self.due)
                self.due += 1
        for place in sorted(self.done):
            yield self.done[place]

    def _patience(self) -> float | None:
        """Return for how long to wait: until the deadline, or until it is looked whether workers still start."""
        if self.deadline is None:
            return None
        passed, starting = time.monotonic() - self.checked, self.grid.starting()
        self.checked += passed
        if starting and self.starting_seconds < MOST_STARTING:
            self.starting_seconds += passed
            self.deadline += passed
        left = max(0.0, self.deadline - self.checked)
        return min(left, 0.5) if starting else left

    def _submit(self) -> None:
        """Hand waiting batches to the workers with the fewest batches."""
        load = Counter(part.worker for part in self.running.values() if part.last)
        size = len(self.batches[0])
        while self.waiting:
            worker = min(range(len(self.grid.actors)), key=lambda w: (load[w], w))
            ahead = self.batches[self.waiting[0]][0] // size - self.due // size
            # A client that is slow must not keep idle workers from those behind it.
            if load[worker] >= QUEUED or ahead >= (self.window if load[worker] else max(self.window, AHEAD)):
                break
            load[worker] += 1
            batch = self.waiting.popleft()
            places = self.batches[batch]
            for start, reference in zip(range(0, len(places), self.part), self._send(batch, worker), strict=True):
                end = start + self.part
                self.running[reference] = _Part(worker, batch, places[start:end], end >= len(places))

    def _send(self, number: int, worker: int) -> list[Any]:
        """Hand a batch to a worker; return a reference for each part of its replies."""
        batch = [self.messages[i] for i in self.batches[number]]
        envelopes = [pack(message, self.shared) for message in batch]
        wanted = {r.key for e in envelopes for r in (e.records or {}).values() if isinstance(r, SharedRecord)}
        if number not in self.contexts:
            self.contexts[number] = [self.grid.stored(message.metadata.dst_node_id) for message in batch]
        references = {key: self.references[key] for key in wanted}
        actor = self.grid.actors[worker]
        # Ray's own pickler asks a function in Python about every object.
        packed = pickle.dumps((envelopes, self.contexts[number]), pickle.HIGHEST_PROTOCOL)
        first = actor.handle.remote(packed, references, self.part)
        return [first, *(actor.more.remote(self.part) for _ in range(self.part, len(batch), self.part))]

    def _receive(self, worker: int) -> None:
        """Read a worker's next replies."""
        # It answers in order, but its death shows on all its batches at once: the oldest is the fatal one.
        reference = next(ref for ref, part in self.running.items() if part.worker == worker)
        part = self.running.pop(reference)
        # Of a batch that runs again, some replies came before its worker ended.
        new = [k for k, place in enumerate(part.places) if place not in self.answered]
        try:
            replies = self.grid.read([self.messages[i] for i in part.places], reference, new)
        except ray.exceptions.RayActorError as error:
            self._bury(part, error)
            return
        except ray.exceptions.RayError as error:
            replies = [_died(self.messages[part.places[k]], error) for k in new]
        self._answer([part.places[k] for k in new], replies)
        if part.last:
            del self.contexts[part.batch]

    def _answer(self, places: list[int], replies: list[Message]) -> None:
        fresh = {i: reply for i, reply in zip(places, replies, strict=True) if i not in self.answered}
        self.done.update(fresh)
        self.answered.update(fresh)

    def _bury(self, fatal: _Part, error: Exception) -> None:
        """Replace the worker that ended; the batches that it had run again, unless the fatal one is given up."""
        for reference, part in [(ref, part) for ref, part in self.running.items() if part.worker == fatal.worker]:
            del self.running[reference]
            if part.last and part.batch != fatal.batch:
                self.waiting.append(part.batch)
        self.deaths[fatal.batch] += 1
        if self.deaths[fatal.batch] < DEATHS:
            self.waiting.append(fatal.batch)
        else:
            self._divide(fatal.batch, error)
        self.waiting = deque(sorted(self.waiting, key=lambda batch: self.batches[batch][0]))
        self.grid.replace_worker(fatal.worker, kill=False)

    def _divide(self, batch: int, error: Exception) -> None:
        """Let the clients of a batch on which workers keep ending run alone, once; give up one that is alone."""
        places, contexts = self.batches[batch], self.contexts.pop(batch)
        if len(places) == 1:
            self._answer(places, [_died(self.messages[places[0]], error)])
            return
        for place, context in zip(places, contexts, strict=True):
            if place not in self.answered:
                self.contexts[len(self.batches)] = [context]
                self.deaths[len(self.batches)] = DEATHS - 1
                self.waiting.append(len(self.batches))
                self.batches.append([place])

    def _capacity(self, most: int) -> Capacity:
        message = self.messages[0]
        context = self.grid.stored(message.metadata.dst_node_id).open()
        for left in range(DEATHS, 0, -1):
            measured = self.grid.actors[0].capacity.remote(pack(message, self.shared), context, self.references, most)
            try:
                found: Capacity = ray.get(measured)
                return found
            except ray.exceptions.RayActorError:
                if left == 1:
                    raise
                self.grid.replace_worker(0, kill=False)
        raise AssertionError


def part_size(reply_bytes: int | None) -> int:
    """Return how many replies are fetched at once, given the bytes of the largest so far; None where none came yet."""
    return PART if reply_bytes is None else max(PART, min(MOST, PART_BYTES // max(1, reply_bytes)))


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
