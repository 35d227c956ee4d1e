"""Clients of a secure sum that hold vectors instead of models, and a server that runs its exchanges."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

from fedlora.clients.secure import answer, masked
from fedlora.communication.secure_sums import KEYS, SECURE, SHARES, SUM, UNMASK
from fedlora.config import Config, load_config
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.strategies.client_noise import ClientNoise
from fedlora.strategies.secure_sums import SecureSums, SecureUpdates, read_masked
from fedlora.strategies.updates import Update
from tests.configs import override
from tests.messages import FIRST_NODE, error_reply

STAGES = (KEYS, SHARES, SUM, UNMASK)


def secure_config(privacy: Mapping[str, Any] | None = None, **server: Any) -> Config:
    """Make a config with secure sums."""
    content = override("server", {"secure_aggregation": True, **server})
    if privacy:
        content["privacy"] = dict(privacy)
    return load_config(content)


class Crowd:
    """The clients, and the one server that all of a round's messages pass.

    Parameters
    ----------
    config : Config
    vectors : mapping of int to ndarray [n]
        What each client would send.
    gone : mapping of str to collection of int
        By exchange, who does not answer it, nor any later one.

    Attributes
    ----------
    seen : dict of str to list of Message
        All replies that the server got, by exchange; those of SUM also of clients whose reply is lost.
    failed : list of int
    """

    def __init__(
        self, config: Config, vectors: Mapping[int, np.ndarray], gone: Mapping[str, Collection[int]] | None = None
    ) -> None:
        self.config, self.vectors, self.gone = config, vectors, gone or {}
        text = config.to_toml()
        self.contexts = {
            client: Context(
                1, FIRST_NODE + client, {"partition-id": client, "simulated": True}, RecordDict(), {"config": text}
            )
            for client in vectors
        }
        self.sums, self.noise = SecureSums(config), ClientNoise(config)
        self.noise.prepare(len(vectors), secret=False)
        self.sums.send = self._send
        self.seen: dict[str, list[Message]] = {stage: [] for stage in STAGES}
        self.failed: list[int] = []

    def is_gone(self, client: int, stage: str) -> bool:
        """Whether a client does not answer an exchange."""
        return any(client in self.gone.get(before, ()) for before in STAGES[: STAGES.index(stage) + 1])

    def sum(self, weights: Mapping[int, float], group: str = "1") -> torch.Tensor | None:
        """Return the mean that the server learns of a round; None where there is none."""
        size = len(next(iter(self.vectors.values())))
        shapes = {"a": (size,)}
        nodes = {client: FIRST_NODE + client for client in weights}
        left = self.sums.share_keys(weights, nodes, group, size, lambda client, *_: self.failed.append(client))
        stream, start = self._updates(left, group, shapes), torch.zeros(size).double()
        updates = SecureUpdates(stream, start, shapes, self.sums, self.noise)
        found = updates.mean()
        assert (found is None) == bool(updates.missing)
        return None if found is None else found["a"]

    def masked(self, client: int, group: str) -> ArrayRecord:
        """Return what a client answers to the round's own message."""
        content = RecordDict(self.sums.content(client))
        message = Message(content, FIRST_NODE + client, "train", group_id=group)
        participant: Any = SimpleNamespace(
            config=self.config, context=self.contexts[client], client=client, charge_update=lambda: None
        )
        return masked(participant, message, {"a": torch.from_numpy(self.vectors[client])})

    def _updates(self, left: list[int], group: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        for client in left:
            message = Message(RecordDict(), FIRST_NODE + client, "train", group_id=group)
            content = RecordDict({"arrays": self.masked(client, group), "metrics": MetricRecord({"num-examples": 1})})
            reply = Message(content, reply_to=message)
            self.seen[SUM].append(reply)
            if not self.is_gone(client, SUM):
                vector, _ = read_masked(reply, shapes["a"][0], mechanism_of(self.config))
                yield Update(client, 1.0, vector, shapes)

    def _send(self, messages: list[Message]) -> Any:
        for message in messages:
            client, stage = message.metadata.dst_node_id - FIRST_NODE, str(message.content[SECURE]["stage"])
            if not self.is_gone(client, stage):
                try:
                    reply = answer(message, self.contexts[client])
                    self.seen[stage].append(reply)
                    yield reply
                except ValueError as error:
                    yield error_reply(message, 101, str(error))
