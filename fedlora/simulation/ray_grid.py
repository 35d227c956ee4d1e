"""RayGrid: Flower's Grid on Ray actors.

Strategies and clients cannot tell it from a real federation. What it needs of Flower's internals (TaskIdentity, message
ids) stays in this module.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import tempfile
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from flwr.app import ArrayRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlora.errors import ClientErrorCode, InputError
from fedlora.simulation.envelope import SharedRecord, pack, pack_record, unpack
from fedlora.simulation.notes import Once
from fedlora.simulation.placement import Need, count_processes
from fedlora.simulation.worker import Worker

log = logging.getLogger("fedlora")

RUN_ID = 1
SERVER_NODE_ID = 1
FIRST_NODE_ID = 2
"""Node ids follow the partitions: client i is node FIRST_NODE_ID + i."""

QUERY_BATCH = 64
"""Queries are answered without work: many go at once."""

PART = 16
"""A batch's replies come so many at a time: the driver reads and sums the first while the others are encoded."""

QUEUED = 2
"""Batches in flight a worker, so that it does not wait for the driver between two of them."""


@dataclass(frozen=True)
class _Part:
    """Replies that are under way: a worker's, to some of a batch's messages, by their places."""

    worker: int
    batch: int
    places: list[int]
    last: bool


class RayGrid(Grid):
    """Runs simulated clients in Ray actors.

    Parameters
    ----------
    client_app : ClientApp or str
        The app, or ``module:attribute`` to import it from in each worker.
    num_clients : int
    workers : int, optional
        Number of actors; by default as many as fit into the cluster.
    cpus_per_worker : int
        Cores, and torch threads, of an actor.
    gpus_per_worker : float
        GPUs of an actor; a fraction shares one.
    cohort_size : int or "auto"
        Clients that a worker gets at once; "auto" asks a worker how many fit into its memory, and gives every worker
        some. It is lowered when memory still runs out.
    address : str, optional
        A running Ray cluster; by default Ray starts on this machine.
    run_config : dict, optional
        What clients find in ``context.run_config``.
    states : mutable mapping of int to RecordDict, optional
        Where clients' ``context.state`` is kept, by client; a dict by default.
    work : callable (client) -> float, optional
        How much a client has to do. Clients of like work share a cohort, and the largest go first, so that neither a
        cohort nor a worker waits long for its last.
    on_cohort_size : callable (int), optional
        Told what "auto" became, and when it is lowered.

    Raises
    ------
    InputError
        If no worker fits, or a GPU is asked for and there is none.

    Notes
    -----
    Replies come in the order of the messages, as soon as they are there; at most a few batches a worker are under way,
    so that memory does not grow with the number of clients. An array record that several messages carry travels once a
    round and worker.
    """

    def __init__(
        self,
        client_app: ClientApp | str,
        num_clients: int,
        *,
        workers: int | None = None,
        cpus_per_worker: int = 1,
        gpus_per_worker: float = 0.0,
        cohort_size: int | Literal["auto"] = 1,
        address: str | None = None,
        run_config: dict[str, Any] | None = None,
        states: MutableMapping[int, RecordDict] | None = None,
        work: Callable[[int], float] | None = None,
        on_cohort_size: Callable[[int], None] | None = None,
    ) -> None:
        self.num_clients, self.cohort_size = num_clients, cohort_size
        self.work, self.on_cohort_size = work, on_cohort_size
        self.run_config = run_config or {}
        self.states: MutableMapping[int, RecordDict] = {} if states is None else states
        self._app, self._cpus, self._gpus = client_app, cpus_per_worker, gpus_per_worker
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_NODE_ID
        self._ids, self._once = itertools.count(), Once()
        self._pushed: dict[str, Message] = {}
        self._actors: list[Any] = []
        self._start(address, workers)

    def _start(self, address: str | None, workers: int | None) -> None:
        self._started_ray = start_ray(address)
        try:
            self.num_workers = _count_workers(workers, self._cpus, self._gpus)
            if not self._started_ray:
                self.num_workers = _count_free(self.num_workers, workers, self._cpus, self._gpus)
        except InputError as error:
            self.close()
            if self._started_ray:
                raise
            remedy = f"{error.remedy}; this is a Ray that runs already: give it more, or end it with ray.shutdown()"
            raise InputError(error.field, error.value, remedy) from None
        self._actors = [self._start_worker() for _ in range(self.num_workers)]
        _OPEN.add(self)

    def __enter__(self) -> RayGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and Ray if this grid started it."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        _OPEN.discard(self)
        if self._started_ray:
            ray.shutdown()

    def set_run(self, run: Run) -> None:
        """Do nothing: a simulation has one run."""

    @property
    def run(self) -> Run:
        """Run information, empty but for its id."""
        return Run.create_empty(RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message, as ``Message(...)`` does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of all clients, in the order of their partitions."""
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self.num_clients)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages until their replies are pulled."""
        return [self._register(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the pushed messages of these ids and return their replies."""
        pushed = [self._pushed.pop(i) for i in list(message_ids) if i in self._pushed]
        return list(self.send_and_receive(pushed))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Run messages on the workers and yield their replies in the order of the messages.

        Parameters
        ----------
        messages : iterable of Message
        timeout : float, optional
            Seconds after which replies that are not there yet are given up; the workers that are late are replaced.
        """
        outgoing = list(messages)
        for message in outgoing:
            self._pushed.pop(self._register(message))
        return self._exchange(outgoing, None if timeout is None else time.monotonic() + timeout)

    def _register(self, message: Message) -> str:
        # As wide as Flower's own ids: the bytes of a reply, which names the message, depend on no counter.
        message_id = f"{next(self._ids):064x}"
        message.metadata.__dict__["_message_id"] = message_id
        self._pushed[message_id] = message
        return message_id

    def _exchange(self, messages: list[Message], deadline: float | None) -> Iterator[Message]:
        shared, references = _share_records(messages)
        batches, in_order = self._batches(messages, shared, references)
        waiting = deque(range(len(batches)))
        # In order, no more than a window of replies is held; else the first message may be in the last batch.
        window = 2 * QUEUED * len(self._actors) if in_order else len(batches)
        running: dict[Any, _Part] = {}  # by reference, in the order of submission
        done: dict[int, Message] = {}
        due = 0
        while due + len(done) < len(messages):
            load = Counter(part.worker for part in running.values() if part.last)
            while waiting and waiting[0] < due // len(batches[0]) + window:
                worker = min(range(len(self._actors)), key=lambda w: (load[w], w))
                if load[worker] >= QUEUED:
                    break
                load[worker] += 1
                batch = waiting.popleft()
                chosen = [messages[i] for i in batches[batch]]
                sent = self._submit(chosen, worker, shared, references)
                for reference, start in zip(sent, range(0, len(chosen), PART), strict=True):
                    places = batches[batch][start : start + PART]
                    running[reference] = _Part(worker, batch, places, start + PART >= len(chosen))
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait(list(running), num_returns=1, timeout=left)
            if not ready:
                for late in {part.worker for part in running.values()}:
                    ray.kill(self._actors[late])
                    self._actors[late] = self._start_worker()
                break
            # A worker answers in order, but its death shows on all its batches at once: the oldest is the fatal one.
            worker = running[ready[0]].worker
            reference = next(ref for ref, part in running.items() if part.worker == worker)
            part = running.pop(reference)
            chosen = [messages[i] for i in part.places]
            try:
                replies = self._collect(chosen, reference)
            except ray.exceptions.RayError as error:
                replies = [_died(message, error) for message in chosen]
                if isinstance(error, ray.exceptions.RayActorError):
                    # Batches that were queued behind the fatal one never started: they go to the new worker.
                    for ref, other in [(ref, other) for ref, other in running.items() if other.worker == worker]:
                        del running[ref]
                        if other.batch == part.batch:
                            done.update((i, _died(messages[i], error)) for i in other.places)
                        elif other.last:
                            waiting.append(other.batch)
                    waiting = deque(sorted(waiting))
                    self._actors[worker] = self._start_worker()
            done.update(zip(part.places, replies, strict=True))
            while due in done:
                yield done.pop(due)
                due += 1
        for late_message in sorted(done):
            yield done[late_message]

    def _batches(
        self, messages: list[Message], shared: dict[int, SharedRecord], references: dict[int, list[Any]]
    ) -> tuple[list[list[int]], bool]:
        """Divide messages, by their places, into the workers' batches; say whether these follow the messages' order."""
        order, size = list(range(len(messages))), QUERY_BATCH
        if messages and not messages[0].metadata.message_type.startswith(MessageType.QUERY):
            if self.cohort_size == "auto":
                # Every worker gets some, whatever one could hold.
                share = -(-len(messages) // len(self._actors))
                self._set_cohort_size(min(share, self._capacity(messages[0], shared, references)))
            assert isinstance(self.cohort_size, int)
            size = self.cohort_size
            if self.work is not None and size > 1:
                work = [self.work(message.metadata.dst_node_id - FIRST_NODE_ID) for message in messages]
                order.sort(key=lambda i: -work[i])
        in_order = all(i <= j for i, j in itertools.pairwise(order))
        return [order[i : i + size] for i in range(0, len(order), size)], in_order

    def _capacity(self, message: Message, shared: dict[int, SharedRecord], references: dict[int, list[Any]]) -> int:
        context = self._context(message.metadata.dst_node_id)
        measured = self._actors[0].capacity.remote(pack(message, shared), context, references)
        return int(ray.get(measured))

    def _set_cohort_size(self, size: int) -> None:
        self.cohort_size = size
        if self.on_cohort_size is not None:
            self.on_cohort_size(size)

    def _submit(
        self, batch: list[Message], worker: int, shared: dict[int, SharedRecord], references: dict[int, list[Any]]
    ) -> list[Any]:
        """Hand a batch to a worker; return a reference to every part of its replies."""
        envelopes = [pack(message, shared) for message in batch]
        wanted = {r.key for e in envelopes for r in (e.records or {}).values() if isinstance(r, SharedRecord)}
        contexts = [self._context(message.metadata.dst_node_id) for message in batch]
        actor = self._actors[worker]
        first = actor.handle.remote(envelopes, contexts, {key: references[key] for key in wanted}, PART)
        return [first, *(actor.more.remote(PART) for _ in range(PART, len(batch), PART))]

    def _collect(self, batch: list[Message], reference: Any) -> list[Message]:
        envelopes, states, limit = ray.get(reference)
        with self._once:
            for note in itertools.chain.from_iterable(envelope.notes for envelope in envelopes):
                log.warning("%s", note)
        if isinstance(self.cohort_size, int) and limit < self.cohort_size:
            self._set_cohort_size(limit)
        for message, state in zip(batch, states, strict=True):
            self.states[message.metadata.dst_node_id - FIRST_NODE_ID] = state
        return [unpack(envelope) for envelope in envelopes]

    def _context(self, node_id: int) -> Context:
        client = node_id - FIRST_NODE_ID
        return Context(
            run_id=RUN_ID,
            node_id=node_id,
            node_config={"partition-id": client, "num-partitions": self.num_clients, "simulated": True},
            state=self.states.get(client) or RecordDict(),
            run_config=self.run_config,
        )

    def _start_worker(self) -> Any:
        actor = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus)(Worker)
        return actor.remote(self._app, self._cpus)


def start_ray(address: str | None) -> bool:
    """Start Ray on this machine, or connect to a cluster; say whether this call did it.

    Raises
    ------
    InputError
        If Ray cannot be started or reached.
    """
    if ray.is_initialized():
        _check_connected(address)
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        _check_listening(address)
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, ValueError, RuntimeError) as error:
        if "AF_UNIX path length" in str(error):
            folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
            remedy = "is too long a path for Ray's sockets; set the environment variable RAY_TMPDIR to a short folder"
            raise InputError("RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR", folder, remedy) from None
        remedy = f"Ray cannot be reached or started ({error}); give the HOST:PORT of a running cluster, or leave it out"
        raise InputError("simulation.address", address, remedy) from None
    if callable(terminated) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)  # Ray's own prints a stack and aborts
    return True


def _check_connected(address: str | None) -> None:
    """Refuse an address that is not that of the Ray to which this process is connected already."""
    there = ray.get_runtime_context().gcs_address
    host_and_port = (address or "").rpartition("//")[2]
    # Ray's own words (auto, local) and its client's ray:// addresses name no cluster in this form.
    if ":" in host_and_port and not (address or "").startswith("ray://") and host_and_port != there:
        remedy = f"this process is connected to the Ray at {there} already; call ray.shutdown() first, or leave it out"
        raise InputError("simulation.address", address, remedy)


def _check_listening(address: str | None) -> None:
    """Raise an OSError if nothing listens at HOST:PORT: Ray would try again for many minutes."""
    host, _, port = (address or "").rpartition("//")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10.0).close()


def _count_workers(wanted: int | None, cpus: int, gpus: float) -> int:
    needs = [
        Need("CPU", cpus, "simulation.cpus_per_worker", cpus),
        Need("GPU", gpus, "simulation.gpus_per_worker", gpus),
    ]
    fit = count_processes(needs, "worker")
    if wanted is not None and wanted > fit:
        raise InputError("simulation.workers", wanted, f"only {fit} fit; lower it, cpus_per_worker or gpus_per_worker")
    return wanted or fit


def _count_free(most: int, wanted: int | None, cpus: int, gpus: float) -> int:
    """Say how many of the workers that fit find room in a Ray that others than this process' grids use too.

    What ended a moment ago is freed after some seconds. A worker without room would be waited for without end.
    """
    own_cpus = sum(grid.num_workers * grid._cpus for grid in _OPEN)
    own_gpus = sum(grid.num_workers * grid._gpus for grid in _OPEN)
    deadline = time.monotonic() + _FREED_SECONDS
    while True:
        free = ray.available_resources()
        room = int((free.get("CPU", 0.0) + own_cpus) / cpus + 1e-9)
        if gpus:
            room = min(room, int((free.get("GPU", 0.0) + own_gpus) / gpus + 1e-9))
        if room >= most:
            return most
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    if room and wanted is None:
        return room
    held = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))
    field, value = ("simulation.workers", wanted) if room else ("simulation.cpus_per_worker", cpus)
    raise InputError(field, value, f"others hold so much that {room} workers find room ({held} free); lower it")


_FREED_SECONDS = 10.0
_OPEN: weakref.WeakSet[RayGrid] = weakref.WeakSet()


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
