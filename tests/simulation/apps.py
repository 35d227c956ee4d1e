"""Small ClientApps for tests of the grid. What a client does is said by its message's record ``do``."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora.capacity import Capacity
from fedlora.simulation import CohortClientApp


def handle(message: Message, context: Context, cohort: int = 1) -> Message:
    """Sleep, wait for a file, raise or end the process as told; answer with the arrays and what is seen here."""
    client = int(context.node_config["partition-id"])
    do = message.content["do"] if "do" in message.content else ConfigRecord()
    time.sleep(float(do.get(f"sleep-{client}", 0.0)))  # type: ignore[arg-type]
    awaited = str(do.get(f"await-{client}", ""))
    deadline = time.monotonic() + 600  # a busy machine takes minutes to start a worker again
    while awaited and not os.path.exists(awaited):
        if time.monotonic() > deadline:
            raise TimeoutError(f"client {client} waited in vain")
        time.sleep(0.01)
    calls = int(context.state["count"]["calls"]) + 1 if "count" in context.state else 1
    context.state["count"] = MetricRecord({"calls": calls})
    if f"die-{client}" in do:
        os._exit(3)
    once = str(do.get(f"die-once-{client}", ""))
    if once and not os.path.exists(once):
        open(once, "w").close()
        os._exit(3)
    if f"raise-{client}" in do:
        raise ValueError(f"client {client} is out of luck")
    if f"nonsense-{client}" in do:
        return None  # type: ignore[return-value]
    content = RecordDict(
        {
            "metrics": MetricRecord(
                {
                    "client": client,
                    "calls": calls,
                    "pid": os.getpid(),
                    "threads": torch.get_num_threads(),
                    "partitions": int(context.node_config["num-partitions"]),
                    "cohort": cohort,
                }
            ),
            "seen": ConfigRecord({"simulated": bool(context.node_config.get("simulated", False))}),
        }
    )
    for name, value in context.run_config.items():
        content["seen"][f"run-{name}"] = value  # type: ignore[index]
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            content[name] = record
            content["seen"][f"sha-{name}"] = sha(record)  # type: ignore[index]
            content["seen"][f"id-{name}"] = id(record)  # type: ignore[index]
    return Message(content, reply_to=message)


def sha(record: ArrayRecord) -> str:
    """Hash everything of an array record."""
    digest = hashlib.sha256()
    for name, array in record.items():
        digest.update(f"{name} {array.dtype} {array.shape} {array.stype}".encode() + array.data)
    return digest.hexdigest()


plain = ClientApp()


@plain.train()
def train(message: Message, context: Context) -> Message:
    """Handle one client."""
    return handle(message, context)


cohort = CohortClientApp()


@cohort.train_cohort
def train_cohort(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Handle a cohort; an exception of one ends it for all."""
    return [handle(m, c, len(messages)) for m, c in zip(messages, contexts, strict=True)]


@cohort.query()
def query(message: Message, context: Context) -> Message:
    """Handle a question to one client."""
    return handle(message, context)


streaming = CohortClientApp()


@streaming.train_cohort
def answer_one_after_another(messages: Sequence[Message], contexts: Sequence[Context]) -> Iterator[Message]:
    """Handle a cohort, and give each answer as soon as it is there."""
    for message, context in zip(messages, contexts, strict=True):
        yield handle(message, context, len(messages))


short = CohortClientApp()


@short.train_cohort
def forget_one(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Return one reply too few."""
    replies = [handle(m, c, len(messages)) for m, c in zip(messages, contexts, strict=True)]
    return replies[:1]


ROOM = 3
"""So many clients fit into the memory of :data:`small_memory`."""

LOWERED = {"rows": 1}
"""What :data:`small_memory` chose."""

small_memory = CohortClientApp()


@small_memory.train_cohort
def train_in_small_memory(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Run out of memory, after having touched the states, with more clients than there is room for."""
    replies = [handle(m, c, len(messages)) for m, c in zip(messages, contexts, strict=True)]
    if len(messages) > ROOM:
        raise torch.cuda.OutOfMemoryError("no room")
    return replies


@small_memory.cohort_capacity
def room(message: Message, context: Context, most: int) -> Capacity:
    """Say how many clients fit, and for how many it was asked."""
    return Capacity(ROOM, {"rows": most}, "as many as fit")


@small_memory.chosen_settings
def lowered() -> dict[str, int]:
    """Say what is in force after a training: less than at first."""
    return LOWERED
