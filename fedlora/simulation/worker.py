"""The process that runs clients: loads the app once, then handles batches of messages.

Simulated clients have many of them, on Ray; a real node has one, without Ray (:mod:`fedlora.node.worker_process`).
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import itertools
import logging
import pickle
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedlora.capacity import Capacity
from fedlora.errors import ClientErrorCode
from fedlora.simulation.cohort_app import CohortClientApp
from fedlora.simulation.envelope import Envelope, pack, unpack, unpack_record
from fedlora.simulation.notes import collected_warnings

if TYPE_CHECKING:
    from fedlora.shared_base import Loan

log = logging.getLogger("fedlora")

Part = tuple[list[Envelope], list[RecordDict], Capacity]
"""Replies, the states of their clients, and what memory allows in a pass."""


def load_app(app: ClientApp | str) -> ClientApp:
    """Return a ClientApp, given itself or as ``module:attribute``."""
    if isinstance(app, ClientApp):
        return app
    module, _, attribute = app.partition(":")
    loaded = getattr(importlib.import_module(module), attribute)
    assert isinstance(loaded, ClientApp)
    return loaded


class Worker:
    """Handles messages of clients: a Ray actor of a simulation, or a real node's resident worker.

    Parameters
    ----------
    app : ClientApp or str
        The app, or where to import it from.
    threads : int
        CPU threads for torch; fixed, since the order of sums depends on it.
    """

    def __init__(self, app: ClientApp | str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.app: ClientApp | None = None
        self.broken = ""
        try:
            self.app = load_app(app)
        except Exception:
            # Every client tells: a worker that dies at its start would be started again for each of them.
            self.broken = traceback.format_exc()
        self.shared: dict[int, ArrayRecord] = {}
        self.limit = sys.maxsize
        self.settings: Mapping[str, Any] = {}
        self._settled = False
        self._replies: Iterator[tuple[Message, Context]] = iter(())

    def handle(
        self, envelopes: list[Envelope], contexts: list[Context], references: dict[int, list[Any]], part: int
    ) -> Part:
        """Handle a batch of messages, and return the first ``part`` of its replies.

        An exception of one client becomes an error reply with its traceback, and does not touch the others; the
        client's state stays what it was. A cohort that runs out of GPU memory is halved and run again, from where it
        was.

        Returns
        -------
        (list of Envelope, list of RecordDict, Capacity)
            The replies and the clients' states, in the same order, and what memory allows in a pass.
        """
        self._replies = iter(())
        self._receive(references)
        messages = [unpack(envelope, self.shared) for envelope in envelopes]
        self._replies = zip(self.run(messages, contexts), contexts, strict=True)
        return self.more(part)

    def more(self, part: int) -> Part:
        """Return the next replies of the batch; while they are made, the driver reads those before them."""
        with collected_warnings() as notes:
            made = [(pack(reply), context.state) for reply, context in itertools.islice(self._replies, part)]
        envelopes = [envelope for envelope, _ in made]
        if notes and envelopes:
            envelopes[0] = dataclasses.replace(envelopes[0], notes=tuple(notes))
        return envelopes, [state for _, state in made], self.allowed

    @property
    def allowed(self) -> Capacity:
        """What memory has been found to allow in a pass."""
        return Capacity(self.limit, self.settings)

    def run(self, messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        """Do as :meth:`handle` in the caller's own process; the contexts' states are changed in place."""
        done = 0
        training = bool(messages) and messages[0].metadata.message_type == MessageType.TRAIN
        settings = self.app.settings_function if training and isinstance(self.app, CohortClientApp) else None
        while done < len(messages):
            part = slice(done, done + self.limit)
            for reply in self._run(messages[part], contexts[part]):
                done += 1
                if settings is not None and not reply.has_error():
                    self.settings = settings()
                yield reply
        if training and not self._settled:
            # Model and data are loaded and stay: the collector need not walk them in the middle of every few rounds.
            gc.collect()
            gc.freeze()
            self._settled = True

    def borrow(self, loans: list[Loan]) -> None:
        """Use the base models of another process, where they are on this one's GPUs."""
        from fedlora.shared_base import borrow  # imports transformers, which apps of others may do without

        borrow(loans)

    def prepare(self, context: Context, known: Mapping[Any, Any]) -> None:
        """Load what clients will need; what fails here fails again, and is told, with the first message."""
        function = self.app.preparation_function if isinstance(self.app, CohortClientApp) else None
        if function is not None:
            with suppress(Exception):
                function(context, known)

    def capacity(self, envelope: Envelope, context: Context, references: dict[int, list[Any]], most: int) -> Capacity:
        """Say how many clients train in one pass; 1 where the app cannot say."""
        self._receive(references)
        return self.measure(unpack(envelope, self.shared), context, most)

    def measure(self, message: Message, context: Context, most: int) -> Capacity:
        """Do as :meth:`capacity` in the caller's own process."""
        function = self.app.capacity_function if isinstance(self.app, CohortClientApp) else None
        return Capacity(1) if function is None else function(message, context, most)

    def _receive(self, references: dict[int, list[Any]]) -> None:
        if not references:
            self.shared = {}
            return
        import ray  # a real node needs none, and starts sooner

        self.shared = {
            key: self.shared[key] if key in self.shared else unpack_record(ray.get(reference))
            for key, (reference,) in references.items()
        }

    def _run(self, messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        """Handle messages in one pass where the app can, or one by one; fewer where memory runs out."""
        if self.app is None:
            yield from (_failed(message, self.broken) for message in messages)
            return
        # Faster than copy.deepcopy.
        states = [pickle.loads(state) for state in [pickle.dumps(context.state) for context in contexts]]
        cohort = self.app.cohort_function if isinstance(self.app, CohortClientApp) else None
        done = 0
        training = all(message.metadata.message_type == MessageType.TRAIN for message in messages)
        if cohort is not None and len(messages) > 1 and training:
            out_of_memory = False
            try:
                for reply in _checked(cohort(messages, contexts), len(messages)):
                    yield reply
                    done += 1
            except Exception as error:
                # One client's failure must not take the others along: below they run one by one, from where they were.
                out_of_memory = isinstance(error, torch.cuda.OutOfMemoryError)
                if not out_of_memory:
                    why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    log.warning("clients are trained one at a time, since a pass of several failed (%s)", why)
            if done == len(messages):
                return
            for context, state in zip(contexts[done:], states[done:], strict=True):
                context.state = copy.deepcopy(state)
            torch.cuda.empty_cache()
            if out_of_memory:
                self.limit = max(1, (len(messages) - done) // 2)
                yield from self._run(messages[done:][: self.limit], contexts[done:][: self.limit])
                return
        for message, context, state in zip(messages[done:], contexts[done:], states[done:], strict=True):
            try:
                (reply,) = _checked([self.app(message, context)], 1)
            except Exception:
                context.state = state
                reply = _failed(message, traceback.format_exc())
            yield reply


def _checked(replies: Iterable[object], count: int) -> Iterator[Message]:
    """Pass on as many replies as there are messages; where it can be told before the first, none of a wrong number.

    Raises
    ------
    TypeError
        If their number is another, or one is no message.
    """
    if isinstance(replies, Sized) and len(replies) != count:
        raise TypeError(f"the ClientApp returned {len(replies)} replies for {count} messages")
    made = 0
    for reply in replies:
        if not isinstance(reply, Message) or made == count:
            raise TypeError(f"the ClientApp returned a {type(reply).__name__} as reply {made + 1} of {count} messages")
        made += 1
        yield reply
    if made < count:
        raise TypeError(f"the ClientApp returned {made} replies for {count} messages")


def _failed(message: Message, reason: str) -> Message:
    return Message(Error(code=ClientErrorCode.FAILED, reason=reason), reply_to=message)
