"""fedlora's own ClientApp, but client 1 does something else in round 2; one app for each fault."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, Context, Message

from fedlora.clients import client_app
from fedlora.simulation import CohortClientApp

CULPRIT, ROUND = 1, 2
MENDED = "TESTS_CLIENTS_MENDED"
"""Environment variable: whoever was broken is no more. A run goes on with the clients that it began with."""


def _app(fault: Callable[[Message], None], *, all_clients: bool = False) -> CohortClientApp:
    """Make an app that trains as fedlora does; the fault has the culprit's reply."""
    app = CohortClientApp()
    app.query()(client_app.describe)

    @app.train_cohort
    def train(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """Train, and let the fault change the reply, raise, or end the process."""
        replies = list(client_app.train(messages, contexts))
        for message, context, reply in zip(messages, contexts, replies, strict=True):
            asked: Any = message.content["config"]
            if asked["server-round"] == ROUND and (all_clients or context.node_config["partition-id"] == CULPRIT):
                fault(reply)
        return replies

    return app


def _set(value: Any) -> Callable[[Message], None]:
    def fault(reply: Message) -> None:
        record: Any = reply.content["arrays"]
        name = sorted(record)[0]
        record[name] = value(record[name])

    return fault


def _kill(reply: Message) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise(error: Exception) -> Callable[[Message], None]:
    def fault(reply: Message) -> None:
        raise error

    return fault


def _raise_unless_mended(reply: Message) -> None:
    if MENDED not in os.environ:
        raise MemoryError("no room at all")


def _say(name: str, value: Any) -> Callable[[Message], None]:
    def fault(reply: Message) -> None:
        metrics: Any = reply.content["metrics"]
        metrics[name] = value

    return fault


killed = _app(_kill)
raising = _app(_raise(MemoryError("client 1 has no room")))
nan = _app(_set(lambda array: Array(array.numpy() * np.float32("nan"))))
headless = _app(_set(lambda array: Array(array.dtype, array.shape, array.stype, b"\x93NUMPY\x01\x00\x08\x00{'descr'")))
heavy = _app(_say("num-examples", 1.7e308))
broken = _app(_raise_unless_mended, all_clients=True)
