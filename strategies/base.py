"""What all methods share: seeded sampling, streaming aggregation, and the form that every method fills in."""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.adapters import AdaptedModel, adapt
from fedlora.adapters.model import PARAMETERISATIONS, linear_shape
from fedlora.adapters.peft_format import export_peft
from fedlora.communication.wire import Arrays, decode_as, encode, wire_dtype
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.errors import ClientErrorCode, InputError, RunError, plain_text
from fedlora.models import load_base
from fedlora.strategies.aggregation import Drift, WeightedMean, in_client_order
from fedlora.strategies.replies import ReplyError, first_replies, is_finite, read_update
from fedlora.training import evaluate
from fedlora.training.cohort import learning_rate

log = logging.getLogger("fedlora")

NO_REPLY = 0
"""Code of a client's failure to answer in time."""

UNAVAILABLE = (
    NO_REPLY,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.MESSAGE_UNAVAILABLE,
)
"""Codes of clients that are not there; all but the first the SuperLink answers in a node's place."""

_LONGEST_REASON = 20_000  # characters; a simulated client's is a traceback


@dataclass
class RoundReport:
    """What a round of training gave, beside the arrays.

    Attributes
    ----------
    clients : list of int
        Sampled, in order.
    failed : list of dict
        client, code and error of each that failed or did not answer.
    metrics : dict of int to MetricRecord
        By client.
    aggregate_seconds : float
    drift : float or None
        See :class:`~strategies.aggregation.Drift`.
    uncounted : str
        Why the round gave no new arrays; "" where it did.
    """

    clients: list[int] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[int, MetricRecord] = field(default_factory=dict)
    aggregate_seconds: float = 0.0
    drift: float | None = None
    uncounted: str = ""

    @property
    def only_absent(self) -> bool:
        """Whether those that failed were not there."""
        return all(failure["code"] in UNAVAILABLE for failure in self.failed)


@dataclass(frozen=True)
class Payload:
    """Numbers (not bytes) that a method sends to or from one client: once, and down and up in a round."""

    initial: int
    down: int
    up: int


@dataclass(frozen=True)
class Planned:
    """What a run will do, if every client answers.

    Attributes
    ----------
    initial_bytes, downlink_bytes, uplink_bytes : int
        Payload of all clients and rounds.
    trainable_parameters : int
    final_evaluations : int
        How often the test examples are looked at after the last round.
    ranks : tuple of int or "full"
        Of each client, where clients have ranks of their own.
    """

    initial_bytes: int
    downlink_bytes: int
    uplink_bytes: int
    trainable_parameters: int
    final_evaluations: int = 1
    ranks: tuple[int | Literal["full"], ...] = ()


class FederatedStrategy(Strategy):
    """Base of all methods: samples partitions, sends the global arrays, averages what comes back.

    A method fills in the class attributes, :meth:`start_arrays` and :meth:`payload`; one whose aggregate is no weighted
    mean overrides :meth:`aggregate_train`.

    Parameters
    ----------
    config : Config

    Attributes
    ----------
    name, title, paper : str
        ``method.name``, what it is in a line, and where it comes from.
    parameterisation : str
        What is trained: ``lora``, ``sb`` or ``expert``.
    trained : tuple of str
        Factors that clients train and send, beside the head; the others are frozen and travel once.
    learning_rates : dict of str to float
        Default learning rate by optimiser.
    nodes : dict of int to int
        Client (partition) number to node id; set before the first round.
    names : list of str
        Names of the real nodes, by client number; empty in simulation.
    examples : dict of int to int
        Each client's number of examples, by which it weighs, as it said before the first round. Of a client that nobody
        asked the reply's own number counts.
    waits : bool
        Whether clients that are not there are waited for: a round of which all are away does not end the run.
    report : RoundReport
        Of the last round.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    parameterisation: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]
    learning_rates: ClassVar[dict[str, float]]

    def __init__(self, config: Config) -> None:
        self.config = config
        self.nodes: dict[int, int] = {}
        self.names: list[str] = []
        self.examples: dict[int, int] = {}
        self.waits = False
        self.on_reply: Callable[[int], None] | None = None
        self.report = RoundReport()
        self._sent = ArrayRecord()
        self._failing: set[int] = set()

    @abstractmethod
    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """Return the start of all factors (the head's is the model's), before the first round.

        Parameters
        ----------
        adapted : AdaptedModel
            On the server, with its factors zero.
        data : FederatedData
            For starts that read public or pooled data.
        """

    @classmethod
    @abstractmethod
    def payload(cls, layers: list[tuple[int, int]], rank: int, head: int) -> Payload:
        """Return the method's formula.

        Parameters
        ----------
        layers : list of (int, int)
            (m, n), outputs and inputs, of every adapted layer.
        rank : int
        head : int
            Numbers in the trainable head.
        """

    @property
    def covers_init(self) -> bool:
        """Whether epsilon covers everything that the start read."""
        return True

    def formula_bytes(self, adapted: AdaptedModel) -> dict[str, int]:
        """Payload of a client in bytes by direction: initial, down, up."""
        layers = [linear_shape(adapter.base) for adapter in adapted.adapters.values()]
        head = sum(adapted.parameter(name)[0].numel() for name in adapted.head_names)
        numbers = self.payload(layers, self.config.method.rank, head)
        size = torch.finfo(wire_dtype(self.config.model.dtype)).bits // 8
        return {"initial": numbers.initial * size, "down": numbers.down * size, "up": numbers.up * size}

    def client_formula(self, adapted: AdaptedModel) -> Callable[[int, int, str], int]:
        """Return the payload in bytes as a function of round, client and direction; equal for all by default."""
        formula = self.formula_bytes(adapted)
        return lambda server_round, client, direction: formula[direction]

    def refuses(self, client: int, name: str) -> InputError | None:
        """Say why a real node that comes, or came, as this client cannot take part; None where it can."""
        return None

    def server_device(self) -> str:
        """Where the server's model is: on the GPU where the simulation uses one."""
        return "cuda" if self.config.simulation.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu"

    def holds(self, client: int, answered: Collection[int]) -> bool:
        """Whether there are arrays to send to a client once these have answered; from the start by default."""
        return True

    def planned(self, adapted: AdaptedModel) -> Planned:
        """Say what the run will send and train, of the model's skeleton and the clients in ``nodes``."""
        formula = self.client_formula(adapted)
        sent = dict.fromkeys(("initial", "down", "up"), 0)
        seen: set[int] = set()
        for server_round in range(1, self.config.run.rounds + 1):
            clients = self.sample(server_round)
            for client in clients:
                sent["initial"] += 0 if client in seen else formula(server_round, client, "initial")
                sent["down"] += formula(server_round, client, "down") if self.holds(client, seen) else 0
                sent["up"] += formula(server_round, client, "up")
            seen |= set(clients)
        return Planned(
            initial_bytes=sent["initial"],
            downlink_bytes=sent["down"],
            uplink_bytes=sent["up"],
            trainable_parameters=sum(adapted.parameter(name)[0].numel() for name in adapted.names(self.trained)),
        )

    def server_model(self, data: FederatedData, device: str | None = None) -> AdaptedModel:
        """Load the base model with the method's adapters in it; on the device ``meta`` its skeleton."""
        base = load_base(self.config, data.label_names, device or self.server_device())
        return adapt(base, self.config, self.parameterisation)

    def refine(self, adapted: AdaptedModel, data: FederatedData, server_round: int) -> Arrays | None:
        """Work on the server after a round's aggregate; return the arrays that take its place, or None."""
        return None

    def evaluate(self, adapted: AdaptedModel, data: FederatedData, server_round: int) -> dict[str, Any]:
        """Evaluate on the test set, and on the validation set if there is one (key ``validation``)."""
        size = self.config.server.batch_size
        metrics = evaluate(adapted, data.test, size, data.domain_names)
        if data.validation is not None:
            metrics["validation"] = evaluate(adapted, data.validation, size)
        return metrics

    def export(self, adapted: AdaptedModel, data: FederatedData, folder: Path) -> None:
        """Write the result into the run folder: ``adapter/``."""
        export_peft(adapted, self.config, folder / "adapter", data.label_names)

    def facts(self, adapted: AdaptedModel) -> dict[str, Any]:
        """Return what summary.json says beside what all methods have."""
        return {}

    def learning_rate(self, server_round: int) -> float:
        """Learning rate of a round: the config's or the method's own, by the schedule."""
        base = self.config.client.learning_rate or self.learning_rates[self.config.client.optimizer]
        return learning_rate(self.config.client, base, server_round, self.config.run.rounds)

    def sample(self, server_round: int) -> list[int]:
        """Draw the clients of a round from the run's seed and the round alone."""
        clients = sorted(self.nodes)
        count = max(1, round(self.config.server.fraction_train * len(clients)))
        if count == len(clients):
            return clients
        rng = np.random.default_rng([self.config.run.seed, server_round, 0x5A])
        return sorted(rng.choice(clients, count, replace=False).tolist())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Address the round's clients."""
        if not self.nodes:
            self.nodes = dict(enumerate(sorted(grid.get_node_ids())))
        self.report = RoundReport(clients=self.sample(server_round))
        self._sent = arrays
        config = ConfigRecord(dict(config))
        config["server-round"] = server_round
        config["learning-rate"] = self.learning_rate(server_round)
        content = RecordDict({"arrays": arrays, "config": config})
        return [
            Message(content, self.nodes[client], MessageType.TRAIN, group_id=str(server_round))
            for client in self.report.clients
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the clients' arrays by their numbers of examples, as the replies come."""
        # As one vector: clients are many, and so are the small arrays of an adapter.
        shapes, dtype = self._asked()
        mean, drift = WeightedMean(), Drift({"all": decode_as(self._sent, shapes, dtype)})
        for client, message in self.valid_replies(replies, str(server_round)):
            started = time.perf_counter()
            try:
                vector, metrics = read_update(message, shapes, dtype, private=self.private)
            except ReplyError as error:
                self.fail(client, ClientErrorCode.REPLY, f"the reply is refused: {error}")
            else:
                self.report.metrics[client] = metrics
                weight = self.weight(client)
                mean.add({"all": vector}, weight)
                drift.add({"all": vector}, weight)
            self.report.aggregate_seconds += time.perf_counter() - started
        started = time.perf_counter()
        result = mean.result() if self.enough_replies() else None
        if result is None:
            self.report.uncounted = self.report.uncounted or "no client that answered holds examples"
        elif not is_finite(result.values()):
            self.report.uncounted, result = "the mean is not finite", None
        self.report.drift = drift.result(result)
        record = None
        if result is not None:
            parts = result["all"].split([math.prod(shape) for shape in shapes.values()])
            arrays = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
            record = encode(arrays, wire_dtype(self.config.model.dtype))
        self.report.aggregate_seconds += time.perf_counter() - started
        return record, self.mean_metrics()

    def _asked(self) -> tuple[dict[str, tuple[int, ...]], torch.dtype]:
        """Names, shapes and dtype of the arrays that were sent, which are those that must come back."""
        shapes = {name: tuple(array.shape) for name, array in self._sent.items()}
        dtypes = {array.dtype for array in self._sent.values()}
        return shapes, getattr(torch, dtypes.pop()) if dtypes else wire_dtype(self.config.model.dtype)

    @property
    def private(self) -> bool:
        """Whether clients say what privacy they spend."""
        return self.config.privacy.mode != "none"

    def weight(self, client: int) -> float:
        """Return a client's weight before normalisation: its number of examples."""
        examples = self.examples.get(client, self.report.metrics[client]["num-examples"])
        return float(examples)  # type: ignore[arg-type]

    def enough_replies(self) -> bool:
        """Whether the round counts; else its report says why not."""
        count, least = len(self.report.metrics), self.config.server.min_replies
        if count < least:
            self.report.uncounted = f"{count} replies are fewer than server.min_replies = {least}"
        return count >= least

    def valid_replies(self, replies: Iterable[Message], group: str = "") -> Iterable[tuple[int, Message]]:
        """Yield (client, reply) in client order, one reply a client; log and count the failures.

        Parameters
        ----------
        replies : iterable of Message
        group : str
            The round, as the messages name it; "" takes replies to any.

        Raises
        ------
        RunError
            If every client of the round failed, unless it was one of several: one alone must not end the run.
        """
        asked = {self.nodes[client]: client for client in self.report.clients}
        answered = set()
        for reply in in_client_order(first_replies(replies, asked, group, log.warning), list(asked)):
            client = asked[reply.metadata.src_node_id]
            answered.add(client)
            if self.on_reply is not None:
                self.on_reply(client)
            if not reply.has_error():
                yield client, reply
            else:
                self.fail(client, reply.error.code, reply.error.reason or "")
        for client in self.report.clients:
            if client not in answered:
                self.fail(client, NO_REPLY, "no reply within the timeout")
        if len(self.report.failed) < len(self.report.clients):
            self._failing.clear()
        elif self.report.clients and not (self.waits and self.report.only_absent):
            self._failing |= set(self.report.clients)
            if len(self._failing) >= min(2, len(self.nodes)):
                said = self.report.failed[0]["error"].strip().rpartition("\n")[2]  # a traceback's last line
                raise RunError(f"every client of the round failed; the first said: {said} (run.log has all)")

    def fail(self, client: int, code: int, error: str) -> None:
        """Count and log a client's failure."""
        error = plain_text(error, _LONGEST_REASON)
        self.report.failed.append({"client": client, "code": int(code), "error": error})
        log.warning("client %d failed: %s", client, error)

    def mean_metrics(self) -> MetricRecord | None:
        """Average the clients' metrics by their numbers of examples."""
        rows = list(self.report.metrics.values())
        if not rows:
            return None
        weights = np.array([self.weight(client) for client in self.report.metrics])
        mean = MetricRecord({"num-examples": float(weights.sum())})
        if all(isinstance(row.get("loss"), int | float) for row in rows):
            losses = np.array([row["loss"] for row in rows], dtype=float)
            known = np.isfinite(losses)
            if weights[known].any():
                mean["loss"] = float(np.average(losses[known], weights=weights[known]))
        return mean

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask no client: evaluation is central, on held-out text."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing, as nothing was asked."""
        return None

    def summary(self) -> None:
        """Log what runs."""
        log.info("%s, rank %d, %d clients", self.title, self.config.method.rank, len(self.nodes))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the arrays, as JSON; nothing by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


def drawn_factors(adapted: AdaptedModel, seed: int) -> Arrays:
    """Draw the usual LoRA start for every layer: A of its own, B = 0."""
    generator = torch.Generator().manual_seed(seed)
    arrays: Arrays = {}
    initial = PARAMETERISATIONS["lora"].initial_factors
    for path, adapter in adapted.adapters.items():
        shape = linear_shape(adapter.base)
        rank = adapted.parameter(f"{path}.lora_A").shape[1]
        arrays |= {f"{path}.{factor}": value for factor, value in initial(*shape, rank, generator).items()}
    return arrays
