"""fedlora's own client, but some clients of some rounds fail, in a way that is drawn.

It is a module of its own because workers import it. What fails is in the JSON file that the environment variable
:data:`PLAN` names; :mod:`fedlora.experiments.benchmarks.soak` writes it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, Context, Error, Message

from fedlora.clients import client_app
from fedlora.errors import ClientErrorCode
from fedlora.simulation import CohortClientApp

PLAN = "FEDLORA_FAULTS"

app = CohortClientApp()
app.query()(client_app.describe)


@app.train_cohort
def train(messages: Sequence[Message], contexts: Sequence[Context]) -> Iterator[Message]:
    """Train as fedlora does, then fail as planned."""
    replies = client_app.train(messages, contexts)
    for message, context, reply in zip(messages, contexts, replies, strict=True):
        settings: Any = message.content["config"]
        place = f"{settings['server-round']}/{context.node_config['partition-id']}"
        kind = _plan()["faults"].get(place)
        yield reply if kind is None else _fail(kind, place, message, reply)


@cache
def _plan() -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(Path(os.environ[PLAN]).read_text(encoding="utf-8"))
    return plan


def _fail(kind: str, place: str, message: Message, reply: Message) -> Message:
    if kind == "exception":
        raise MemoryError("no room at all")
    if kind == "absent":
        return Message(Error(ClientErrorCode.FAILED, "absent"), reply_to=message)
    if kind == "late":
        time.sleep(3600)
    if kind == "killed":
        died = Path(_plan()["folder"]) / place.replace("/", "-")
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return reply
    if kind == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    _spoil(kind, reply)
    return reply


def _spoil(kind: str, reply: Message) -> None:
    """Change a reply into one that the server has to refuse."""
    record: Any = reply.content["arrays"]
    metrics: Any = reply.content["metrics"]
    name = sorted(record)[0]
    if kind == "nan":
        record[name] = Array(record[name].numpy() * np.float32("nan"))
    elif kind == "shape":
        record[name] = Array(record[name].numpy()[:-1])
    elif kind == "oversize":
        record[name] = Array(np.zeros((1024, 1024), np.float32))
    elif kind == "truncated":
        array = record[name]
        record[name] = Array(array.dtype, array.shape, array.stype, array.data[: len(array.data) // 2])
    elif kind == "nonsense":
        metrics["num-examples"] = -1
    else:
        raise ValueError(f"no fault is called {kind}")
