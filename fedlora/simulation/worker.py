"""The process that runs simulated clients: loads the app once, then handles batches of messages."""

from __future__ import annotations

import importlib
import traceback
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
        self.app = load_app(app)
        self.shared: dict[int, ArrayRecord] = {}

    def handle(
        self, envelopes: list[Envelope], contexts: list[Context], references: dict[int, list[Any]]
    ) -> tuple[list[Envelope], list[RecordDict]]:
        """Handle a batch of messages and return the replies and the clients' states, in the same order.

        An exception of one client becomes an error reply with its traceback and does not touch the others.
        """
        self.shared = {
            key: self.shared[key] if key in self.shared else unpack_record(ray.get(reference))
            for key, (reference,) in references.items()
        }
        replies = self._run([unpack(envelope, self.shared) for envelope in envelopes], contexts)
        return [pack(reply) for reply in replies], [context.state for context in contexts]

    def _run(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        cohort = self.app.cohort_function if isinstance(self.app, CohortClientApp) else None
        if cohort is not None and len(messages) > 1 and all(m.metadata.message_type == "train" for m in messages):
            try:
                return cohort(messages, contexts)
            except Exception:
                # One client's failure must not take the others along: below they run one by one.
                torch.cuda.empty_cache()
        replies = []
        for message, context in zip(messages, contexts, strict=True):
            try:
                replies.append(self.app(message, context))
            except Exception:
                error = Error(code=ClientErrorCode.FAILED, reason=traceback.format_exc())
                replies.append(Message(error, reply_to=message))
        return replies
