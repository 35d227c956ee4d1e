"""Evaluation by the clients: each tests on examples of its own, and answers with sums and counts alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from fedlora.adapters import AdaptedModel
from fedlora.communication.codecs import recode
from fedlora.config import Config
from fedlora.data.tokens import TokenTable
from fedlora.errors import ClientErrorCode, plain_text
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.strategies.replies import LONGEST_REASON, MOST_EXAMPLES, ReplyError, first_replies, only_reply_errors
from fedlora.strategies.summary import fairness
from fedlora.strategies.updates import Shapes
from fedlora.tasks import Task
from fedlora.training.evaluation import statistics

if TYPE_CHECKING:
    from fedlora.strategies.base import FederatedStrategy

log = logging.getLogger("fedlora")

_LARGEST = 1e300 / MOST_EXAMPLES


@dataclass
class ClientEvaluation:
    """The clients' evaluations of one round, and the clients that refuse to evaluate.

    Attributes
    ----------
    task : Task
    shapes : mapping of str to tuple of int
        Of the statistics that the task sums, by :meth:`expect`; others are not taken.
    asked : dict of int to int
        Of the round, node id to client number.
    refused : set of int
        Clients whose owners do not allow it: they are not asked again.
    rows : list of dict
        A row a client that answered: its number of examples, its loss, and the metric by which its task compares.
    sums : dict of str to ndarray
        Over all clients.
    failed : dict of int to str
        By client, why it gave nothing.
    """

    task: Task
    shapes: Shapes = field(default_factory=dict)
    asked: dict[int, int] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    rows: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def expect(self, adapted: AdaptedModel, table: TokenTable) -> None:
        """Learn from one of the server's examples what a client's answer must have."""
        if not self.shapes:
            found = statistics(adapted, table, np.arange(1), 1)
            self.shapes = {name: values.shape[1:] for name, values in found.items()}

    def begin(self, asked: Mapping[int, int]) -> None:
        """Forget the round before."""
        self.asked, self.rows, self.failed = dict(asked), [], {}
        self.sums = {name: np.zeros(shape) for name, shape in self.shapes.items()}

    def add(self, client: int, message: Message) -> None:
        """Add one client's answer.

        Raises
        ------
        ReplyError
        """
        examples, sums = read_sums(message, self.shapes)
        if not examples:
            return
        alone = only_reply_errors(self.task.metrics)(sums)
        names = dict.fromkeys(("loss", self.task.client_metric))
        self.rows.append({"client": client, "examples": examples} | {name: alone[name] for name in names})
        for name, value in sums.items():
            self.sums[name] += value

    def fail(self, client: int, code: int, why: str) -> None:
        """Take note of a client that gives nothing."""
        self.failed[client] = why
        log.warning("client %d did not evaluate: %s", client, why)
        if code == ClientErrorCode.POLICY:
            self.refused.add(client)

    def scores(self) -> dict[str, Any]:
        """Return the metrics of the clients' examples together; empty if no client answered."""
        return self.task.metrics(self.sums) if self.rows else {}

    def metrics(self, config: Config) -> dict[str, Any]:
        """Return the metrics for rounds.jsonl; empty if no client answered."""
        if not self.rows:
            return {}
        covered = not mechanism_of(config).is_private
        return {
            **self.task.metrics(self.sums),
            "examples": sum(row["examples"] for row in self.rows),
            "clients": len(self.rows),
            "failed": len(self.failed),
            # The sums are over the clients' examples, without noise.
            "covered": covered,
            "fairness": fairness(self.rows, self.task.client_metric, covered=covered),
        }


def evaluating_clients(strategy: FederatedStrategy, server_round: int) -> list[int]:
    """Draw the clients that evaluate after a round, from the run's seed and the round alone; none if none is due."""
    config, clients = strategy.config, sorted(strategy.nodes.keys() - strategy.evaluation.refused)
    due = server_round % config.server.evaluate_every == 0 or server_round == config.run.rounds
    share = config.server.fraction_evaluate if due else 0.0
    count = min(len(clients), max(1, round(share * len(strategy.nodes)))) if share else 0
    rng = np.random.default_rng([config.run.seed, server_round, 0xE5])
    return sorted(rng.choice(clients, count, replace=False).tolist()) if count < len(clients) else clients


def evaluation_messages(
    strategy: FederatedStrategy, server_round: int, arrays: ArrayRecord, config: ConfigRecord
) -> list[Message]:
    """Make one message per client, with the arrays that it would train on next, without the parts that clients keep.

    A client that would make its own start, as nothing comes down to it yet, has no model to evaluate. What never goes
    down to be trained is made by the client here too.
    """
    codecs, parts = strategy.codecs, stale_kinds(strategy, server_round)
    kept = {n for n in arrays if strategy.kind(n) in parts or strategy.role(n).down == "never"}
    common = ArrayRecord({name: array for name, array in arrays.items() if name not in kept})
    common = recode(common, codecs.once, codecs.down)
    records: dict[Hashable, ArrayRecord] = {}
    messages = []
    for client in evaluating_clients(strategy, server_round):
        record, own = common, strategy.client_arrays(client)
        if own is not None:
            key, part = own
            if not part:
                continue
            if key not in records:
                records[key] = codecs.down.encode(part)
            record = records[key]
        settings = ConfigRecord({**config, **strategy.client_settings(client, server_round)})
        content = RecordDict({"arrays": record, "config": settings})
        messages.append(Message(content, strategy.nodes[client], MessageType.EVALUATE, group_id=str(server_round)))
    clients = {node: client for client, node in strategy.nodes.items()}
    strategy.evaluation.begin({m.metadata.dst_node_id: clients[m.metadata.dst_node_id] for m in messages})
    return messages


def stale_kinds(strategy: FederatedStrategy, server_round: int) -> list[str]:
    """Return the kinds that change, but reach a client of the next rounds only where its copy is stale."""
    run = strategy.config
    rounds = range(server_round + 1, min(server_round + 2, run.run.rounds) + 1)  # two show what alternates
    kinds = {k for r in rounds for k, role in strategy.roles(run, r).items() if role.down == "stale"}
    return sorted(kinds & strategy.changing())


def read_evaluations(found: ClientEvaluation, replies: Iterable[Message]) -> MetricRecord | None:
    """Add up the clients' answers; one that is wrong costs its client its place, and never the run.

    Returns
    -------
    MetricRecord or None
        The metrics of all clients' examples together.
    """
    valid = {found.asked[r.metadata.src_node_id]: r for r in first_replies(replies, found.asked, "", log.warning)}
    for client in sorted(found.asked.values()):
        reply = valid.get(client)
        if reply is None:
            found.fail(client, 0, "no reply within the timeout")
        elif reply.has_error():
            found.fail(client, reply.error.code, plain_text(reply.error.reason or "", LONGEST_REASON))
        else:
            try:
                found.add(client, reply)
            except ReplyError as error:
                found.fail(client, ClientErrorCode.REPLY, f"the reply is refused: {error}")
    if not found.rows:
        return None
    return MetricRecord({name: float(value) for name, value in found.task.metrics(found.sums).items()})


@only_reply_errors
def read_sums(message: Message, shapes: Shapes) -> tuple[int, dict[str, np.ndarray]]:
    """Read a client's answer: its number of examples, and a finite number for every entry of every statistic.

    Raises
    ------
    ReplyError
        If it holds something else, or lacks something.
    """
    metrics = message.content.get("metrics")
    if not isinstance(metrics, MetricRecord) or len(message.content) != 1:
        raise ReplyError("it needs metrics and nothing else")
    given: dict[str, Any] = dict(metrics)
    examples = given.pop("num-examples", None)
    if not isinstance(examples, int) or not 0 <= examples <= MOST_EXAMPLES:
        raise ReplyError("num-examples is no whole number of examples")
    if not examples:
        return 0, {}
    if given.keys() != shapes.keys():
        raise ReplyError("its statistics are not those of the run's task")
    found = {}
    for name, shape in shapes.items():
        value = np.asarray(given[name], np.float64)
        if value.size != math.prod(shape) or not (np.abs(value) < _LARGEST).all():
            raise ReplyError(f"{name} is not {math.prod(shape)} finite numbers")
        found[name] = value.reshape(shape)
    return examples, found
