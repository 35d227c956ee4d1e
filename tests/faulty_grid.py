"""Simulated clients of this process that fail on demand, by a clock of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import Array, Error, Message

from fedlora.errors import ClientErrorCode
from fedlora.flower import from_bytes, to_bytes
from fedlora.simulation import LocalGrid
from fedlora.simulation.simulated_grid import FIRST_NODE_ID

SLOW = 1000.0
"""Seconds that a slow client trains; others take one."""

Faults = dict[tuple[str, int], str]
"""What goes wrong, by the message's group and the client.

``error``: the client raises; ``nan``: it sends what is not finite; ``slow``: it takes long; ``lost``: its reply never
comes; ``held``: its reply comes with those to the next messages instead; ``stop``: the run is stopped.
"""


class FaultyGrid(LocalGrid):
    """A LocalGrid with :data:`Faults`; what it was asked is in ``asked``, clients by group in the order of messages."""

    faults: ClassVar[Faults] = {}
    asked: ClassVar[dict[str, list[int]]] = {}
    now: ClassVar[float] = 0.0

    def _start(self, address: str | None, workers: int | None) -> None:
        super()._start(address, workers)
        self._held: list[Message] = []
        self._run = self._worker.run
        self._worker.run = self._run_with_faults  # type: ignore[method-assign]

    def _run_with_faults(self, messages: list[Message], contexts: list[Any]) -> Iterator[Message]:
        states = [from_bytes(to_bytes(context.state)) for context in contexts]
        replies = self._run(messages, contexts)
        for message, reply, context, state in zip(messages, replies, contexts, states, strict=True):
            fault = self._fault(message)
            type(self).now += SLOW if fault == "slow" else 1.0
            if fault == "stop":
                raise KeyboardInterrupt
            if fault == "error":
                context.state = state
                yield Message(Error(ClientErrorCode.FAILED, "no room"), reply_to=message)
                continue
            if fault == "nan":
                record: Any = reply.content["arrays"]
                name = sorted(record)[0]
                record[name] = Array(record[name].numpy() * np.float32("nan"))
            yield reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send, lose some replies and hold others back."""
        outgoing = list(messages)
        training = [m for m in outgoing if m.metadata.message_type == "train"]
        for message in training:
            client = message.metadata.dst_node_id - FIRST_NODE_ID
            self.asked.setdefault(message.metadata.group_id, []).append(client)
        faults = {message.metadata.dst_node_id: self._fault(message) for message in training}
        held, self._held = (self._held, []) if training else ([], self._held)
        yield from held
        for reply in super().send_and_receive(outgoing, timeout=timeout):
            fault = faults.get(reply.metadata.src_node_id, "")
            if fault == "held":
                self._held.append(reply)
            elif fault != "lost":
                yield reply

    def _fault(self, message: Message) -> str:
        meta = message.metadata
        return self.faults.get((meta.group_id, meta.dst_node_id - FIRST_NODE_ID), "")


@contextmanager
def faulty(faults: Faults) -> Iterator[dict[str, list[int]]]:
    """Let runs have faults; yield whom they ask, by the messages' group."""
    clock = SimpleNamespace(monotonic=lambda: FaultyGrid.now)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora.simulator.LocalGrid", FaultyGrid)
        patch.setattr("fedlora.simulation.simulated_grid.time", clock)
        patch.setattr("fedlora.simulation.local_grid.time", clock)
        patch.setattr(FaultyGrid, "faults", faults)
        patch.setattr(FaultyGrid, "asked", {})
        yield FaultyGrid.asked


def everybody(group: str, clients: int, fault: str) -> Faults:
    """Let the same happen to all clients of a group of messages."""
    return {(group, client): fault for client in range(clients)}


def left_out(rows: list[dict[str, str]]) -> dict[tuple[int, int], dict[int, str]]:
    """Return the codes of left_out.csv, by client and by round and attempt."""
    found: dict[tuple[int, int], dict[int, str]] = defaultdict(dict)
    for row in rows:
        found[int(row["round"]), int(row["attempt"])][int(row["client"])] = row["code"]
    return dict(found)
