"""The process that runs clients: loads the app once, then handles batches of messages.

Simulated clients have many of them, on Ray; a real node has one, without Ray (:mod:`fedlora.node.worker`).
"""

from __future__ import annotations

import copy
import gc
import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.errors import ClientErrorCode
from fedlora.simulation.cohort_app import CohortClientApp
from fedlora.simulation.envelope import Envelope, pack, unpack, unpack_record


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
        self._settled = False

    def handle(
        self, envelopes: list[Envelope], contexts: list[Context], references: dict[int, list[Any]]
    ) -> tuple[list[Envelope], list[RecordDict], int]:
        """Handle a batch of messages.

        An exception of one client becomes an error reply with its traceback, and does not touch the others; the
        client's state stays what it was. A cohort that runs out of GPU memory is halved and run again, from where it
        was.

        Returns
        -------
        (list of Envelope, list of RecordDict, int)
            The replies and the clients' states, in the same order, and the most clients that memory allows in a pass.
        """
        self._receive(references)
        replies = self.run([unpack(envelope, self.shared) for envelope in envelopes], contexts)
        return [pack(reply) for reply in replies], [context.state for context in contexts], self.limit

    def run(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        """Do as :meth:`handle` in the caller's own process; the contexts' states are changed in place."""
        replies: list[Message] = []
        while len(replies) < len(messages):
            part = slice(len(replies), len(replies) + self.limit)
            replies += self._run(messages[part], contexts[part])
        if not self._settled and messages and messages[0].metadata.message_type == "train":
            # Model and data are loaded and stay: the collector need not walk them in the middle of every few rounds.
            gc.collect()
            gc.freeze()
            self._settled = True
        return replies

    def capacity(self, envelope: Envelope, context: Context, references: dict[int, list[Any]]) -> int:
        """Measure how many clients fit into one pass; 1 where the app cannot say."""
        self._receive(references)
        return self.measure(unpack(envelope, self.shared), context)

    def measure(self, message: Message, context: Context) -> int:
        """Do as :meth:`capacity` in the caller's own process."""
        function = self.app.capacity_function if isinstance(self.app, CohortClientApp) else None
        return 1 if function is None else function(message, context)

    def _receive(self, references: dict[int, list[Any]]) -> None:
        if not references:
            self.shared = {}
            return
        import ray  # a real node needs none, and starts sooner

        self.shared = {
            key: self.shared[key] if key in self.shared else unpack_record(ray.get(reference))
            for key, (reference,) in references.items()
        }

    def _run(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        if self.app is None:
            return [_failed(message, self.broken) for message in messages]
        states = [copy.deepcopy(context.state) for context in contexts]
        cohort = self.app.cohort_function if isinstance(self.app, CohortClientApp) else None
        if cohort is not None and len(messages) > 1 and all(m.metadata.message_type == "train" for m in messages):
            try:
                return _checked(cohort(messages, contexts), len(messages))
            except Exception as error:
                torch.cuda.empty_cache()
                for context, state in zip(contexts, states, strict=True):
                    context.state = copy.deepcopy(state)
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    self.limit = len(messages) // 2
                    return self._run(messages[: self.limit], contexts[: self.limit])
                # One client's failure must not take the others along: below they run one by one, from where they were.
        replies = []
        for message, context, state in zip(messages, contexts, states, strict=True):
            try:
                replies += _checked([self.app(message, context)], 1)
            except Exception:
                context.state = state
                replies.append(_failed(message, traceback.format_exc()))
        return replies


def _checked(replies: Sequence[object], count: int) -> list[Message]:
    messages = [reply for reply in replies if isinstance(reply, Message)]
    if not len(messages) == len(replies) == count:
        raise TypeError(f"the ClientApp returned {[type(r).__name__ for r in replies]} for {count} messages")
    return messages


def _failed(message: Message, reason: str) -> Message:
    return Message(Error(code=ClientErrorCode.FAILED, reason=reason), reply_to=message)
