"""Messages and a Grid without Ray, for tests of what stands around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedlora.communication.wire import encode
from fedlora.flower import Run, act_as, empty_run

# A Message cannot be made without it.
act_as(1, 1)

FIRST_NODE = 100
"""Clients are nodes 100, 101, ...; a strategy may not depend on it."""


def train_message(node: int, content: RecordDict | None = None, server_round: int = 1) -> Message:
    """Make a message to a node."""
    return Message(content or RecordDict(), node, "train", group_id=str(server_round))


def records(arrays: Mapping[str, torch.Tensor] | None = None, **metrics: float) -> RecordDict:
    """Make a reply's content: arrays and metrics (``_`` in a name becomes ``-``)."""
    values = {name.replace("_", "-"): value for name, value in metrics.items()}
    return RecordDict({"arrays": encode(arrays or {}), "metrics": MetricRecord(values)})


def error_reply(message: Message, code: int, reason: str) -> Message:
    """Answer with an error."""
    return Message(Error(code=code, reason=reason), reply_to=message)


def random_record(shapes: Mapping[str, tuple[int, ...]], dtype: Any = np.float32) -> ArrayRecord:
    """Make an array record of given shapes."""
    return ArrayRecord({name: np_array(shape, dtype) for name, shape in shapes.items()})


def np_array(shape: tuple[int, ...], dtype: Any) -> Any:
    """Make one Flower Array."""
    return Array(np.ones(shape, dtype))


class FakeGrid(Grid):
    """Answers messages with a function, and keeps what it was sent.

    Parameters
    ----------
    answer : callable (Message) -> Message or None
        None is no reply.
    nodes : int
    """

    def __init__(self, answer: Callable[[Message], Message | None], nodes: int = 3) -> None:
        self.answer, self.nodes = answer, nodes
        self.sent: list[list[Message]] = []
        self.timeouts: list[float | None] = []

    def set_run(self, run: Run) -> None:
        """Do nothing."""

    @property
    def run(self) -> Run:
        """Return an empty run."""
        return empty_run(7)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes."""
        return range(FIRST_NODE, FIRST_NODE + self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Return an id a message."""
        return [f"id-{message.metadata.dst_node_id}" for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return nothing."""
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Answer one by one, as the replies are asked for."""
        outgoing = list(messages)
        self.sent.append(outgoing)
        self.timeouts.append(timeout)
        return (reply for message in outgoing if (reply := self.answer(message)) is not None)


def settings(**values: Any) -> ConfigRecord:
    """Make a config record."""
    return ConfigRecord({name.replace("_", "-"): value for name, value in values.items()})
