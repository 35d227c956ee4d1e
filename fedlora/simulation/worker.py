"""The process that runs simulated clients: loads the app once, then handles batches of messages."""

from __future__ import annotations

import copy
import importlib
import traceback
from collections.abc import Sequence
from typing import Any

import ray
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
    """Handles messages of simulated clients; one Ray actor each.

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

    def handle(
        self, envelopes: list[Envelope], contexts: list[Context], references: dict[int, list[Any]]
    ) -> tuple[list[Envelope], list[RecordDict]]:
        """Handle a batch of messages and return the replies and the clients' states, in the same order.

        An exception of one client becomes an error reply with its traceback, and does not touch the others; the
        client's state stays what it was.
        """
        self.shared = {
            key: self.shared[key] if key in self.shared else unpack_record(ray.get(reference))
            for key, (reference,) in references.items()
        }
        replies = self._run([unpack(envelope, self.shared) for envelope in envelopes], contexts)
        return [pack(reply) for reply in replies], [context.state for context in contexts]

    def _run(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        if self.app is None:
            return [_failed(message, self.broken) for message in messages]
        states = [copy.deepcopy(context.state) for context in contexts]
        cohort = self.app.cohort_function if isinstance(self.app, CohortClientApp) else None
        if cohort is not None and len(messages) > 1 and all(m.metadata.message_type == "train" for m in messages):
            try:
                return _checked(cohort(messages, contexts), len(messages))
            except Exception:
                # One client's failure must not take the others along: below they run one by one, from where they were.
                torch.cuda.empty_cache()
                for context, state in zip(contexts, states, strict=True):
                    context.state = copy.deepcopy(state)
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
