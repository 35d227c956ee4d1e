"""Any Flower Strategy, adapted once: what it lacks of a method's own is taken from the method."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.arrays import Arrays
from fedlora.communication.broadcast import group_of
from fedlora.communication.codecs import Codec, named, recode, run_codecs
from fedlora.communication.wire import decode, encode, wire_dtype
from fedlora.corrections import correction
from fedlora.errors import ClientErrorCode, InputError, RoundError, plain_text
from fedlora.flower import with_metadata
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.ranks import has_mixed_ranks
from fedlora.strategies.base import FederatedStrategy, RoundReport
from fedlora.strategies.ranked import RankedStrategy
from fedlora.strategies.replies import ReplyError, first_replies, is_finite, read_metrics

log = logging.getLogger("fedlora")


class Guest:
    """Lets a Flower Strategy configure and aggregate the rounds of a method.

    Parameters
    ----------
    strategy : Strategy
    method : FederatedStrategy
        Says what is trained, where it starts and what its bytes are.

    Raises
    ------
    InputError
        If the method is no plain averaging: its rounds are not all alike, clients have ranks of their own, or it makes
        its aggregate itself. If a server optimiser is named, since the strategy takes its place. Or if clients have a
        correction, of which the strategy knows nothing.

    Notes
    -----
    Its state is kept for a resumed run: what it answers to ``state_dict``, if it has one; else its attributes that are
    numbers, texts, arrays, records of arrays, and lists and dicts of these. All else is as its constructor made it.
    """

    def __init__(self, strategy: Strategy, method: FederatedStrategy) -> None:
        self.strategy, self.method = strategy, method
        self.report = RoundReport()
        config = method.config
        self.codecs = run_codecs(config)
        self._sent: dict[int, RecordDict] = {}
        first = method.roles(config, 1)
        plain = all(role.up != "update" and not role.increment and not role.home for role in first.values())
        alike = all(method.roles(config, r) == first for r in range(2, min(config.run.rounds, 4) + 1))
        averages = type(method).aggregate in (FederatedStrategy.aggregate, RankedStrategy.aggregate)
        one_exchange = method.has_one_exchange()
        if not (plain and alike and averages and one_exchange) or has_mixed_ranks(config):
            remedy = f"cannot run the rounds of {method.name}, which are no plain averaging; choose another method"
            raise InputError("strategy", type(strategy).__name__, remedy)
        if correction(config).active:
            remedy = f"needs a server that keeps its variates, which {type(strategy).__name__} does not; use none"
            raise InputError("client.correction", config.client.correction, remedy)
        if (optimizer := config.server.optimizer) != "fedavg":
            remedy = f"has no use beside {type(strategy).__name__}, which takes the server's steps itself; leave it out"
            raise InputError("server.optimizer", optimizer, remedy)
        if (factor := config.server.over_sampling) > 1:
            remedy = f"has no use beside {type(strategy).__name__}, which asks and counts clients itself; leave it out"
            raise InputError("server.over_sampling", factor, remedy)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy address the clients; it is told the method's learning rate, and of no codec."""
        config = ConfigRecord({**config, "learning-rate": self.method.learning_rate(server_round)})
        messages = self.strategy.configure_train(server_round, arrays, config, grid)
        lossless = self.codecs.down is self.codecs.once and not self.codecs.updates
        return messages if lossless else self._encoded(messages)

    def _encoded(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Encode what the strategy addressed; contents that messages share stay shared."""
        known: dict[int, tuple[RecordDict, RecordDict]] = {}
        self._sent = {}
        for message in messages:
            content = message.content
            if id(content) not in known:
                known[id(content)] = content, _recoded(content, self.codecs.once, self.codecs.down)
            message.content = known[id(content)][1]
            self._sent[message.metadata.dst_node_id] = message.content
            yield message

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the strategy aggregate, and note who answered.

        Raises
        ------
        RoundError
            If every client of the round failed.
        """
        self.report = RoundReport(attempt=self.method.attempt)
        asked = {node: client for client, node in self.method.nodes.items()}
        own = first_replies(replies, asked, group_of(server_round, attempt=self.method.attempt), log.warning)
        aggregated, mean = self.strategy.aggregate_train(server_round, self._noted(own))
        if self.report.clients and len(self.report.failed) == len(self.report.clients):
            said = str(self.report.failed[0]["error"]).strip().rpartition("\n")[2]
            raise RoundError(f"every client of round {server_round} failed: {said}")
        if aggregated is not None and not is_finite(decode(aggregated).values()):
            aggregated, self.report.uncounted = None, "the aggregate is not finite"
        if aggregated is not None:
            self.method.replied[server_round] = list(self.report.metrics)
        return aggregated, mean

    def _noted(self, replies: Iterable[Message]) -> Iterator[Message]:
        clients = {node: client for client, node in self.method.nodes.items()}
        for reply in map(self._decoded, replies):
            client = clients.get(reply.metadata.src_node_id, -1)
            self.report.clients.append(client)
            if reply.has_error():
                failed = {"client": client, "code": reply.error.code, "error": reply.error.reason}
                self.report.failed.append(failed)
            else:
                # A user's own client may answer otherwise; what the strategy makes of that is its own affair.
                try:
                    found: Any = reply.content.get("metrics")
                    metrics = read_metrics(found, mechanism=mechanism_of(self.method.config))
                except ReplyError:
                    metrics = MetricRecord()
                self.report.metrics[client] = metrics
            if self.method.on_reply is not None:
                self.method.on_reply(client)
            yield reply

    def _decoded(self, reply: Message) -> Message:
        """Give the strategy what it can average; a reply that is encoded otherwise is a client's error."""
        if reply.has_error() or self.codecs.up is self.codecs.once:
            return reply
        content: RecordDict | Error
        try:
            if self.codecs.updates:
                content = self._values(reply)
            else:
                content = _recoded(reply.content, self.codecs.up, self.codecs.once)
        except ValueError as error:
            content = Error(ClientErrorCode.REPLY, f"the reply is refused: {plain_text(str(error))}")
        return with_metadata(content, reply.metadata)

    def _values(self, reply: Message) -> RecordDict:
        """Add what a client was sent to the updates that it answers with.

        Raises
        ------
        ValueError
        """
        sent = self._sent.get(reply.metadata.src_node_id, RecordDict())
        start: Arrays = {}
        for record in sent.values():
            start |= self.codecs.down.decode(record) if isinstance(record, ArrayRecord) else {}
        content = RecordDict(dict(reply.content))
        for key, record in reply.content.items():
            if isinstance(record, ArrayRecord):
                # Shapes are those that were sent: a client's own could ask for any amount of memory.
                shapes = {name: tuple(array.shape) for name, array in start.items() if name in record}
                updates = named(self.codecs.up.decode_vector(record, shapes), shapes)
                values = {name: start[name] + array for name, array in updates.items()}
                content[key] = self.codecs.once.encode({name: values[name] for name in record})
        return content

    def summary(self) -> None:
        """Let the strategy say what it is."""
        self.strategy.summary()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs of the strategy."""
        own: Callable[[], Mapping[str, Any]] | None = getattr(self.strategy, "state_dict", None)
        return dict(own()) if own is not None else _stored(vars(self.strategy))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        own: Callable[[Mapping[str, Any]], None] | None = getattr(self.strategy, "load_state_dict", None)
        if own is not None:
            own(state)
            return
        for name, value in _restored(state).items():
            setattr(self.strategy, name, value)


def _recoded(content: RecordDict, source: Codec, target: Codec) -> RecordDict:
    """Return a message's content with its arrays in another codec."""
    return RecordDict(
        {key: recode(r, source, target) if isinstance(r, ArrayRecord) else r for key, r in content.items()}
    )


def _stored(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Turn attributes into JSON values and, under ``arrays``, tensors named by their path."""
    arrays: Arrays = {}
    kept: dict[str, Any] = {}
    for name, value in attributes.items():
        try:
            kept[name] = _plain(value, name, arrays)
        except TypeError:
            log.debug("attribute %s of the strategy is not kept: %s", name, type(value).__name__)
    return {"attributes": kept, "arrays": arrays}


def _plain(value: Any, path: str, arrays: Arrays) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        arrays[path] = torch.from_numpy(np.ascontiguousarray(value)).clone()
        return {"numpy": path, "shape": list(value.shape)}
    if isinstance(value, torch.Tensor):
        arrays[path] = value.detach().cpu().clone()
        return {"tensor": path}
    if isinstance(value, ArrayRecord):
        decoded = decode(value)
        for name, array in decoded.items():
            arrays[f"{path}/{name}"] = array
        return {"record": [f"{path}/{name}" for name in decoded], "prefix": f"{path}/"}
    if isinstance(value, dict):
        return {"dict": [[_key(k), _plain(v, f"{path}/{k}", arrays)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_plain(v, f"{path}/{i}", arrays) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        json.dumps(value)
        return {"value": value}
    raise TypeError(type(value).__name__)


def _key(key: Any) -> Any:
    if isinstance(key, str | int) and not isinstance(key, bool):
        return key
    raise TypeError(type(key).__name__)


def _restored(state: Mapping[str, Any]) -> dict[str, Any]:
    arrays: Arrays = state.get("arrays", {})

    def read(item: Mapping[str, Any]) -> Any:
        if "numpy" in item:
            return arrays[item["numpy"]].numpy().reshape(item["shape"]).copy()
        if "tensor" in item:
            return arrays[item["tensor"]]
        if "record" in item:
            named = {path.removeprefix(item["prefix"]): arrays[path] for path in item["record"]}
            return encode(named, next(iter(named.values())).dtype if named else wire_dtype("float32"))
        if "dict" in item:
            return {key: read(value) for key, value in item["dict"]}
        if "list" in item:
            return [read(value) for value in item["list"]]
        if "tuple" in item:
            return tuple(read(value) for value in item["tuple"])
        return item["value"]

    return {name: read(item) for name, item in state.get("attributes", {}).items()}
