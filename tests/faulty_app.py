"""fedlora's own ClientApp, but client 1 fails in round 2."""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import Context, Message

from fedlora.clients import client_app
from fedlora.simulation import CohortClientApp

app = CohortClientApp()
app.query()(client_app.describe)


@app.train_cohort
def train(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Train as fedlora does, and fail after the work is done."""
    replies = client_app.train(messages, contexts)
    for message, context in zip(messages, contexts, strict=True):
        if context.node_config["partition-id"] == 1 and message.content["config"]["server-round"] == 2:
            raise MemoryError("client 1 has no room")
    return replies
