"""A client evaluates the model that came on test examples of its own; sums and their number are all that leaves."""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

from fedlora.adapters import AdaptedModel
from fedlora.clients.half import client_half
from fedlora.clients.held import divide, receive
from fedlora.clients.participant import Participant, participant
from fedlora.communication.codecs import run_codecs
from fedlora.errors import InputError
from fedlora.methods import get_method
from fedlora.training.evaluation import statistics


def evaluate_own(message: Message, context: Context) -> Message:
    """Answer an evaluation message.

    A message carries arrays and ``config`` (server-round), as one for training does, and the parts that the client
    lacks. The reply's metrics are num-examples and the sums of :meth:`fedlora.tasks.Task.statistics`: a number, or a
    list of numbers, a statistic. No text, no label and no example's own statistic is in it. A client without a test
    example says that it has none.

    Raises
    ------
    InputError
        If the run has no test examples for its clients.
    PolicyError, StaleError
        If the node's owner does not allow it.
    """
    client = participant(message, context)
    config = client.config
    if config.data.client_test is None:
        raise InputError("data.client_test", None, "is required: the test examples that a client evaluates on")
    table, rows = client.own_test()
    found: dict[str, Any] = {"num-examples": len(rows)}
    if len(rows):
        adapted = _model(client, message)
        each = statistics(adapted, table, rows, config.server.batch_size)
        found |= {name: _number(values.sum(0).tolist()) for name, values in each.items()}
    return Message(RecordDict({"metrics": MetricRecord(found)}), reply_to=message)


def _model(client: Participant, message: Message) -> AdaptedModel:
    """Put what came, and what stays with the client, into the model: it is what the next round would start from."""
    half = client_half(client.config)
    adapted, settings, record = half.adapted, message.content["config"], message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    after: Any = settings["server-round"]
    roles = get_method(client.config.method.name).roles(client.config, int(after) + 1)
    half.prepare(settings)
    parts = receive(client, message, roles, adapted)
    came = run_codecs(client.config).down.decode(record)
    frozen, start = divide(client, came, parts, roles, adapted)
    adapted.set_shared(frozen)
    adapted.set_clients([half.begin(start)])
    return adapted


def _number(value: Any) -> float | list[float]:
    return list(map(float, value)) if isinstance(value, list) else float(value)
