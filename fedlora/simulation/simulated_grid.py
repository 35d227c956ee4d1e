"""SimulatedGrid: the base class of grids of simulated clients."""

from __future__ import annotations

import itertools
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Self

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedlora.capacity import Capacity
from fedlora.errors import ClientErrorCode
from fedlora.flower import Run, States, act_as, empty_run, set_message_id
from fedlora.simulation.envelope import StoredContext
from fedlora.simulation.notes import Once

RUN_ID = 1
SERVER_NODE_ID = 1
FIRST_NODE_ID = 2
"""Node ids follow the partitions: client i is node FIRST_NODE_ID + i."""

QUERY_BATCH = 64
"""Queries in a batch. They take no work, so that many go at once."""


class SimulatedGrid(Grid):
    """A Flower Grid of simulated clients. Subclasses decide where the clients run.

    Parameters
    ----------
    client_app : ClientApp or str
        The app, or ``module:attribute`` to import it from in each worker.
    num_clients : int
    workers : int, optional
        Number of worker processes; by default as many as fit.
    cpus_per_worker : int
        Cores, and torch threads, of a worker.
    gpus_per_worker : float
        GPUs of a worker; a fraction shares one.
    cohort_size : int or "auto"
        Clients that a worker gets at once; "auto" asks a worker how many are worth a pass and fit into its memory, and
        divides every worker's share into passes of equal size. It is lowered when memory still runs out.
    address : str, optional
        A running Ray cluster; by default Ray starts on this machine.
    run_config : dict, optional
        What clients find in ``context.run_config``, as it is when they are asked.
    states : States, optional
        Where clients' ``context.state`` is kept; in memory by default.
    work : callable (client) -> float, optional
        How much a client has to do. Clients of like work share a cohort, and the largest go first, so that neither a
        cohort nor a worker waits long for its last.
    on_capacity : callable (Capacity), optional
        Called with what "auto" became, when the cohort is lowered, and when a worker chose other settings.

    Notes
    -----
    Replies come in the order of the messages, as soon as they are there.
    """

    num_workers: int

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
        states: States | None = None,
        work: Callable[[int], float] | None = None,
        on_capacity: Callable[[Capacity], None] | None = None,
    ) -> None:
        self.num_clients, self.cohort_size = num_clients, cohort_size
        self.work, self.on_capacity = work, on_capacity
        self._settings: Mapping[str, Any] = {}
        self.run_config = {} if run_config is None else run_config
        self.states = States() if states is None else states
        self.client_app, self.cpus, self.gpus = client_app, cpus_per_worker, gpus_per_worker
        act_as(RUN_ID, SERVER_NODE_ID)
        self.once = Once()
        self._ids = itertools.count()
        self._pushed: dict[str, Message] = {}
        self._start(address, workers)

    @abstractmethod
    def _start(self, address: str | None, workers: int | None) -> None:
        """Start the workers, and set ``num_workers``."""

    def prepare(self, known: Mapping[Any, Any]) -> None:
        """Let the workers load what clients will need, while the caller goes on where they are processes.

        Parameters
        ----------
        known : mapping
            What the caller has found out about the model, which a worker on the same devices need not.
        """

    @abstractmethod
    def close(self) -> None:
        """End what this grid started."""

    @abstractmethod
    def _exchange(self, messages: list[Message], deadline: float | None) -> Iterator[Message]:
        """Run messages; ``deadline`` is of :func:`time.monotonic`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_run(self, run: Run) -> None:
        """Do nothing: a simulation has one run."""

    @property
    def run(self) -> Run:
        """Run information, empty but for its id."""
        return empty_run(RUN_ID)

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
            Seconds after which replies that are not there yet are given up. A client that was at work then answers with
            the error :attr:`~fedlora.errors.ClientErrorCode.LATE`, and keeps the state that it had; one whose turn had
            not come does not answer.
        """
        outgoing = list(messages)
        for message in outgoing:
            self._pushed.pop(self._register(message))
        return self._exchange(outgoing, None if timeout is None else time.monotonic() + timeout)

    def stored(self, node_id: int) -> StoredContext:
        """Return a client's context, with its latest state as it is stored."""
        client = node_id - FIRST_NODE_ID
        context = Context(
            run_id=RUN_ID,
            node_id=node_id,
            node_config={"partition-id": client, "num-partitions": self.num_clients, "simulated": True},
            state=RecordDict(),
            run_config=self.run_config,
        )
        return StoredContext(context, self.states.blobs.get(client, b""))

    def keep(self, messages: Iterable[Message], states: Iterable[bytes | None], allowed: Capacity) -> None:
        """Store the states of the messages' clients, where they changed; lower the cohort size to what is allowed."""
        for message, state in zip(messages, states, strict=True):
            if state is not None:
                self.states.blobs[message.metadata.dst_node_id - FIRST_NODE_ID] = state
        if isinstance(self.cohort_size, int):
            size = min(self.cohort_size, allowed.clients)
            if size < self.cohort_size or allowed.settings != self._settings:
                self._set_capacity(Capacity(size, allowed.settings))

    def batches(self, messages: list[Message], capacity: Callable[[int], Capacity]) -> list[list[int]]:
        """Divide messages, by their indices, into the batches that workers get.

        Parameters
        ----------
        messages : list of Message
        capacity : callable
            Says how many clients train in one pass, of at most so many; called where ``cohort_size`` is "auto".
        """
        order, size = list(range(len(messages))), QUERY_BATCH
        if messages and not messages[0].metadata.message_type.startswith(MessageType.QUERY):
            if self.cohort_size == "auto":
                # Every worker gets as many, whatever one could hold, in passes of equal size.
                share = -(-len(messages) // self.num_workers)
                found = capacity(share)
                passes = -(-share // found.clients)
                self._set_capacity(Capacity(-(-share // passes), found.settings, found.note))
            assert isinstance(self.cohort_size, int)
            size = self.cohort_size
            if self.work is not None and size > 1:
                work = [self.work(message.metadata.dst_node_id - FIRST_NODE_ID) for message in messages]
                order.sort(key=lambda i: -work[i])
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _register(self, message: Message) -> str:
        # As wide as Flower's own ids: the bytes of a reply, which names the message, depend on no counter.
        message_id = f"{next(self._ids):064x}"
        set_message_id(message, message_id)
        self._pushed[message_id] = message
        return message_id

    def _set_capacity(self, capacity: Capacity) -> None:
        self.cohort_size, self._settings = capacity.clients, capacity.settings
        if self.on_capacity is not None:
            self.on_capacity(capacity)


def late_reply(message: Message) -> Message:
    """Return the error of a client that was at work when the time was over."""
    return Message(Error(code=ClientErrorCode.LATE, reason="it was at work when the time was over"), reply_to=message)
