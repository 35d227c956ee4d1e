"""What all methods share: seeded sampling, streaming aggregation, and the form that every method fills in."""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.adapters import AdaptedModel
from fedlora.adapters.model import linear_shape
from fedlora.adapters.parameterisations.lora import drawn_factors as drawn_factors
from fedlora.adapters.peft_format import export_peft
from fedlora.arrays import Arrays, leading
from fedlora.communication.broadcast import group_of
from fedlora.communication.codecs import Codec, named, recode, run_codecs
from fedlora.communication.parts import Parts
from fedlora.communication.secure_sums import SUM, WORD
from fedlora.communication.wire import decode, encode
from fedlora.config import Config, MethodSection
from fedlora.corrections import VARIATES
from fedlora.data.tokens import FederatedData
from fedlora.devices import Placement, gpus
from fedlora.errors import ClientErrorCode, InputError, RoundError, RunError, plain_text
from fedlora.methods import Method, get_method
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.roles import FROZEN, HEAD, Exchange, Role, Roles, changing_kinds, kind_of, trained_kinds
from fedlora.server.aggregators import aggregator_of
from fedlora.server.optimizers import server_optimizer
from fedlora.server.sampling import get_sampling, whose_turn
from fedlora.shared_base import shared_base
from fedlora.strategies.aggregation import in_client_order, weighted_mean
from fedlora.strategies.client_noise import ClientNoise, NoisyUpdates
from fedlora.strategies.evaluation import ClientEvaluation, evaluating_clients, evaluation_messages, read_evaluations
from fedlora.strategies.replies import (
    LONGEST_REASON,
    NO_REPLY,
    ReplyError,
    check_numbers,
    first_replies,
    is_finite,
    read_update,
)
from fedlora.strategies.secure_sums import SecureSums, SecureUpdates, read_masked
from fedlora.strategies.updates import CombinedUpdates, Shapes, Update, Updates
from fedlora.strategies.variates import Variates
from fedlora.tasks import get_task
from fedlora.training import evaluate
from fedlora.training.cohort import learning_rate
from fedlora.transport import carried

log = logging.getLogger("fedlora")

UNAVAILABLE = (
    NO_REPLY,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.MESSAGE_UNAVAILABLE,
)
"""Error codes of absent clients. The SuperLink sends all of them but NO_REPLY."""


@dataclass
class RoundReport:
    """The outcome of one exchange, without the arrays.

    Attributes
    ----------
    clients : list of int
        Sampled, in order.
    failed : list of dict
        client, code and error of each that failed or did not answer.
    surplus : list of int
        Clients that were asked against stragglers, and whose replies the round did not need.
    metrics : dict of int to MetricRecord
        By client.
    seconds, aggregate_seconds : float
        Of the whole exchange, and of the aggregation in it.
    drift : float or None
        See :class:`~strategies.aggregation.Drift`.
    uncounted : str
        Why the round gave no new arrays; "" where it did.
    left_out : list of int
        Sampled, but gone before the round's own message was sent.
    release : dict or None
        What the run has spent after it, where the server adds the noise, by the columns of privacy.csv.
    unused : dict of int to dict
        By client whose reply was not used, what it has spent all the same, by the columns of privacy.csv.
    attempt : int
        How often the round had been repeated.
    """

    clients: list[int] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[int, MetricRecord] = field(default_factory=dict)
    seconds: float = 0.0
    aggregate_seconds: float = 0.0
    drift: float | None = None
    uncounted: str = ""
    left_out: list[int] = field(default_factory=list)
    release: dict[str, float] | None = None
    surplus: list[int] = field(default_factory=list)
    unused: dict[int, dict[str, float]] = field(default_factory=dict)
    attempt: int = 0

    @property
    def addressed(self) -> list[int]:
        """The clients that were sent the round's own message, in order."""
        return [client for client in self.clients if client not in self.left_out]

    @property
    def only_absent(self) -> bool:
        """Whether every failed client was absent."""
        return all(failure["code"] in UNAVAILABLE for failure in self.failed)


@dataclass(frozen=True)
class Payload:
    """Numbers (not bytes) that a method sends to or from one client in one round.

    Attributes
    ----------
    initial : int
        Of the start, on a client's first contact; counted once.
    down, up : int
        Of the round's message to the client, and of its reply.
    """

    initial: int
    down: int
    up: int


@dataclass(frozen=True)
class Sizes:
    """The sizes that a payload formula depends on.

    Attributes
    ----------
    layers : list of (int, int)
        (m, n), outputs and inputs, of every adapted layer.
    rank : int
    head : int
        Numbers in the trained head.
    """

    layers: list[tuple[int, int]]
    rank: int
    head: int


@dataclass(frozen=True)
class Contact:
    """One client's part in one round, for a payload formula.

    Attributes
    ----------
    round, client : int
    since : int or None
        The last round in which the client was sent something before; None at its first contact.
    replied : mapping of int to sequence of int
        By each round before that counted, the clients whose replies entered it.
    exchange : int
        Of the round, from 1.
    """

    round: int
    client: int
    since: int | None
    replied: Mapping[int, Sequence[int]]
    exchange: int = 1


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


class FederatedStrategy(Method, Strategy):
    """Base of all methods: samples clients, sends the global arrays, and aggregates the replies.

    A method's file fills in the class attributes of :class:`~fedlora.methods.Method`, :meth:`roles`,
    :meth:`start_arrays` and :meth:`payload`. If its aggregate is not a weighted mean, it overrides :meth:`aggregate`.
    If its clients hold arrays of other shapes, it overrides :meth:`client_arrays` and :meth:`client_shapes`.

    Parameters
    ----------
    config : Config

    Attributes
    ----------
    arrays : dict of str to Tensor
        The global arrays that rounds change, before the round's aggregate.
    nodes : dict of int to int
        Client (partition) number to node id; set before the first round.
    names : list of str
        Names of the real nodes, by client number; empty in simulation.
    examples : dict of int to int
        Each client's number of examples, known before the first round; it is the client's weight. A client without an
        entry is weighted by the number in its reply.
    replied : dict of int to list of int
        For each round that counted, the clients whose replies it includes.
    waits : bool
        Whether the run continues after a round in which all clients were absent.
    exchange : int
        Number of the current exchange in its round, from 1; the loop sets it by :meth:`enter`.
    attempt : int
        How often the current round was repeated.
    report : RoundReport
        Of the last exchange.
    evaluation : ClientEvaluation
        Results of the clients that evaluated in the last round.
    optimizer : ServerOptimizer
        Steps from the global arrays along the clients' mean. Its state is in the checkpoint.
    codecs : RunCodecs
        Encode the arrays that a round's messages and replies carry.
    variates : Variates
        Control variates of ``client.correction``; without one nothing is kept or sent.
    noise : ClientNoise
        If whole clients are protected (``privacy.mode = "client"``), clips and noises their updates.
    aggregator : Aggregator
        Combines the clients' updates (``server.aggregator``).
    gathered : dict of str to Tensor
        Means of the replies in exchanges before the first round; :meth:`start_arrays` may use them.
    secure : SecureSums
        If sums are secure (``server.secure_aggregation``), runs the exchanges that hide each client's update.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.arrays: Arrays = {}
        self.nodes: dict[int, int] = {}
        self.names: list[str] = []
        self.examples: dict[int, int] = {}
        self.replied: dict[int, list[int]] = {}
        self.waits = False
        self.on_reply: Callable[[int], None] | None = None
        self.exchange = 1
        self.attempt = 0
        self.report = RoundReport()
        self.evaluation = ClientEvaluation(get_task(config.model.task))
        self.optimizer = server_optimizer(config)
        self.codecs = run_codecs(config)
        self.variates = Variates(config)
        self.noise = ClientNoise(config)
        self.aggregator = aggregator_of(config)
        self.gathered: Arrays = {}
        self.secure = SecureSums(config)
        self._failing: set[int] = set()
        self._kinds: dict[str, str] = {}
        self._roles: Roles = {}
        self._record = ArrayRecord()
        self._shapes: Shapes = {}
        self._sent_shapes: Shapes = {}
        self._sent: Arrays = {}
        self._sent_own: dict[int, Arrays] = {}
        self._waited = 0.0

    @property
    def options(self) -> MethodSection:
        """``[method]``, as the method's own Options; a subclass that has some annotates it: ``options: MyOptions``."""
        return self.config.method

    # What a method's file says, beside the facts of its class.

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

    @abstractmethod
    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """Return the method's formula: what one client is sent and sends in a round."""

    def aggregate(self, updates: Updates) -> Arrays | None:
        """Return the global arrays that the round's updates make; the weighted mean by default.

        The server optimiser (``server.optimizer``) goes from the arrays before to those among them that clients train.

        Parameters
        ----------
        updates : Updates
            In the order of the clients. Arrays that go up as ``update`` are moves from what was sent.

        Returns
        -------
        dict of str to Tensor or None
            Arrays that are left out stay as they were. Increments (see :class:`~fedlora.roles.Role`) are named
            ``PATH.residual`` or ``PATH.residual_B`` and ``PATH.residual_A``. None where nothing of any weight came.
        """
        mean = updates.mean()
        if mean is None:
            return None
        moves = {name for name in mean if self.role(name).up == "update"}
        return {name: array + self.arrays[name] if name in moves else array for name, array in mean.items()}

    def head_mean(self, clients: Sequence[Update]) -> Arrays | None:
        """Return the weighted mean of the clients' heads alone; None where nothing of any weight came."""
        return weighted_mean(
            ({n: a for n, a in update.arrays.items() if self.kind(n) == HEAD}, update.weight) for update in clients
        )

    def client_blocks(self, client: int) -> tuple[Hashable, Shapes] | None:
        """Return the shapes of those arrays of which a client holds the leading block alone, and a key.

        Clients of one key have equal shapes. None, the default, stands for a client that holds all there is.
        """
        return None

    def client_sizes(self, sizes: Sizes, client: int) -> Sizes:
        """Return the sizes that a client's payload formula is made of: the global ones by default."""
        return sizes

    def client_arrays(self, client: int) -> tuple[Hashable, Arrays] | None:
        """Return the arrays that are sent to a client in every round, and a key.

        Clients of one key have equal arrays, which are encoded once. None stands for the global arrays. By default
        these are the client's blocks of the global arrays.
        """
        blocks = self.client_blocks(client)
        if blocks is None or not any(name in blocks[1] and self.role(name).down == "round" for name in self.arrays):
            return None
        return blocks[0], self._blocks({n: a for n, a in self.arrays.items() if self.role(n).down == "round"}, client)

    def _blocks(self, arrays: Arrays, client: int) -> Arrays:
        """Return what a client holds of global arrays."""
        blocks = self.client_blocks(client)
        shapes = {} if blocks is None else blocks[1]
        return {name: leading(array, shapes[name]) if name in shapes else array for name, array in arrays.items()}

    def sent_to(self, client: int) -> Arrays:
        """Return the global arrays as a client of the exchange has them, as its codec gave them."""
        return self._blocks(self._sent, client) | self._sent_own.get(client, {})

    def client_shapes(self, client: int) -> Shapes:
        """Return names and shapes of what a client must send, in the order in which the server reads them."""
        blocks = self.client_blocks(client)
        if blocks is None:
            return self._sent_shapes
        return {name: blocks[1].get(name, shape) for name, shape in self._sent_shapes.items()}

    def down_shapes(self, client: int) -> Shapes:
        """Return names and shapes of what comes down to a client in every round."""
        own, blocks = self.client_shapes(client), self.client_blocks(client)
        shapes = self._shapes if blocks is not None or own is self._sent_shapes else own
        if blocks is not None:
            shapes = {name: blocks[1].get(name, shape) for name, shape in shapes.items()}
        return {name: shape for name, shape in shapes.items() if self.role(name).down == "round"}

    def start_request(self, adapted: AdaptedModel, exchange: int) -> Arrays:
        """Return the arrays of an exchange before the first round: what it sends, and zeros where clients answer.

        What clients answered before is in :attr:`gathered`.

        Parameters
        ----------
        adapted : AdaptedModel
            On the server.
        exchange : int
            From 1, of :meth:`~fedlora.methods.Method.start_exchanges`.
        """
        raise NotImplementedError("a method whose clients help to make the start says what they are asked")

    def starting(self) -> Self:
        """Return the strategy of the exchanges before the first round: by their config, for this one's clients."""
        made = type(self)(self.start_exchanges(self.config)[0].training(self.config))
        made.nodes, made.names, made.examples = self.nodes, self.names, self.examples
        made.waits = self.waits
        return made

    def client_settings(self, client: int, server_round: int) -> dict[str, str | int | float | bool]:
        """Return what a message says to a client beside its arrays."""
        return {"server-round": server_round, "learning-rate": self.learning_rate(server_round)}

    def check_reply(self, client: int, message: Message) -> None:
        """Refuse a reply for what no other method's reply has.

        Raises
        ------
        ReplyError
        """

    @property
    def covers_init(self) -> bool:
        """Whether epsilon covers everything that the start read."""
        return self.start_reads(self.config) != "private"

    def refuses(self, client: int, name: str) -> InputError | None:
        """Return why a real node cannot take part as this client; None if it can."""
        return None

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

    def probe(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """Return what a client trains, of arrays as large as any client's, and make its model ready for them.

        A forecast measures a step of local training with them.
        """
        names = self.trained_names(adapted)
        arrays = adapted.arrays(names) | self.start_arrays(adapted, data) | adapted.arrays(adapted.head_names)
        adapted.set_shared(arrays)
        return {name: arrays[name] for name in names}

    def export(self, adapted: AdaptedModel, data: FederatedData, folder: Path) -> None:
        """Write the result into the run folder: ``adapter/``. Clients' own models are added where they can be read."""
        export_peft(adapted, self.config, folder / "adapter", data.label_names)

    def facts(self, adapted: AdaptedModel) -> dict[str, Any]:
        """Return what summary.json says beside what all methods have."""
        return {}

    def summary(self) -> None:
        """Log what runs."""
        log.info("%s, rank %d, %d clients", self.title, self.config.method.rank, len(self.nodes))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the arrays: JSON values, and dicts of tensors. Nothing by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""

    # Arrays and bytes.

    def kind(self, name: str) -> str:
        """Return the kind of an array, as :meth:`roles` names it."""
        kind = self._kinds.get(name)
        if kind is None:
            kind = self._kinds[name] = kind_of(name, ())
        return kind

    def role(self, name: str) -> Role:
        """Return the role of an array in this round."""
        return self._roles.get(self.kind(name), FROZEN)

    def know(self, adapted: AdaptedModel) -> None:
        """Learn which arrays are the head's, and the shapes of those that rounds change."""
        self._kinds = dict.fromkeys(adapted.head_names, HEAD)
        self._shapes = {name: tuple(adapted.parameter(name).shape[1:]) for name in adapted.names(self.changing())}

    def enter(self, server_round: int, exchange: int) -> None:
        """Take on the roles of an exchange of a round."""
        self.exchange = exchange
        self._roles = self.exchanges_of(self.config, server_round)[exchange - 1].roles
        self._sent_shapes = {name: shape for name, shape in self._shapes.items() if self.role(name).up != "never"}

    def changing(self) -> frozenset[str]:
        """Kinds of the global arrays that rounds change."""
        return changing_kinds(exchange.roles for exchange in self._all_exchanges())

    def trained_names(self, adapted: AdaptedModel, server_round: int = 1) -> tuple[str, ...]:
        """Names of the arrays that clients train in a round, in the model's order."""
        return adapted.names(trained_kinds(self.roles(self.config, server_round)))

    def trained_numbers(self, adapted: AdaptedModel) -> int:
        """Count the numbers that clients train in any round."""
        kinds = {kind for exchange in self._all_exchanges() for kind in trained_kinds(exchange.roles)}
        return sum(adapted.parameter(name)[0].numel() for name in adapted.names(kinds))

    def _all_exchanges(self) -> Iterator[Exchange]:
        rounds = range(1, self.config.run.rounds + 1)
        return (exchange for r in rounds for exchange in self.exchanges(self.config, r))

    def sizes(self, adapted: AdaptedModel) -> Sizes:
        """Return what the formula is made of, from the model or its skeleton."""
        layers = [linear_shape(adapter.base) for adapter in adapted.adapters.values()]
        head = sum(adapted.parameter(name)[0].numel() for name in adapted.head_names)
        return Sizes(layers, self.config.method.rank, head)

    def client_formula(self, adapted: AdaptedModel, parts: Parts) -> Callable[[int, int, str], int]:
        """Return the payload in bytes as a function of round, client and direction, in the exchange under way."""
        sizes = self.sizes(adapted)

        def formula(server_round: int, client: int, direction: str) -> int:
            secure = self.secure.payload_bytes(client, direction)
            if self.secure.stage != SUM:
                return secure
            contact = Contact(server_round, client, parts.since.get(client), self.replied, self.exchange)
            numbers = self.payload(self.client_sizes(sizes, client), contact)
            return self._direction_bytes(numbers, client, direction) + secure

        return formula

    def payload_bytes(self, sizes: Sizes, contact: Contact) -> dict[str, int]:
        """Return the formula in bytes, by direction: lossless but for what comes down, and goes up, in every round."""
        numbers = self.payload(self.client_sizes(sizes, contact.client), contact)
        directions = ("initial", "down", "up")
        return {direction: self._direction_bytes(numbers, contact.client, direction) for direction in directions}

    def _direction_bytes(self, numbers: Payload, client: int, direction: str) -> int:
        if direction == "down":
            beside = self.variates.payload_bytes(self._sent_shapes)
            return self._bytes(numbers.down, self.down_shapes(client), self.codecs.down) + beside
        if direction == "up":
            if self.secure.active:
                return WORD * numbers.up
            beside = self.variates.payload_bytes(self._sent_shapes)
            return self._bytes(numbers.up, self.client_shapes(client), self.codecs.up) + beside
        return self._bytes(numbers.initial, {}, self.codecs.once)

    def _bytes(self, numbers: int, shapes: Shapes, codec: Codec) -> int:
        """Return the bytes of so many numbers, if there are any; among them are arrays that the codec encodes."""
        if not numbers or codec is self.codecs.once:
            return numbers * self._dtype.itemsize
        rest = numbers - sum(math.prod(shape) for shape in shapes.values())
        return rest * self._dtype.itemsize + sum(map(codec.payload_bytes, shapes.values()))

    def planned(self, adapted: AdaptedModel) -> Planned:
        """Say what the run will send and train, of the model's skeleton and the clients in ``nodes``."""
        self.know(adapted)
        sizes, sent = self.sizes(adapted), dict.fromkeys(("initial", "down", "up"), 0)
        last: dict[int, int] = {}
        replied: dict[int, list[int]] = {}
        if begun := self.start_exchanges(self.config):
            starter = self.starting()
            starter.know(adapted)
            for exchange in range(1, len(begun) + 1):
                starter.enter(0, exchange)
                asked = starter.sample(0)
                down, up = self.secure.planned_bytes(len(asked))
                sent["down"], sent["up"] = sent["down"] + down, sent["up"] + up
                for client in asked if self.secure.allows(len(asked)) else ():
                    size = starter.payload_bytes(sizes, Contact(0, client, None, {}, exchange))
                    sent["down"] += size["down"]
                    sent["up"] += size["up"]
        for server_round in range(1, self.config.run.rounds + 1):
            clients = self.sample(server_round)
            for exchange in range(1, len(self.exchanges(self.config, server_round)) + 1):
                self.enter(server_round, exchange)
                down, up = self.secure.planned_bytes(len(clients))
                sent["down"], sent["up"] = sent["down"] + down, sent["up"] + up
                for client in clients if self.secure.allows(len(clients)) else ():
                    contact = Contact(server_round, client, last.get(client), replied, exchange)
                    size = self.payload_bytes(sizes, contact)
                    sent["initial"] += 0 if client in last else size["initial"]
                    sent["down"] += size["down"]
                    sent["up"] += size["up"]
                    last[client] = server_round
            self.report.clients = clients
            if len(clients) >= self.config.server.min_replies:
                replied[server_round] = sorted(self.in_turn(server_round, clients)[: self.most_replies])
            for client in evaluating_clients(self, server_round):
                if client not in last:
                    contact = Contact(server_round + 1, client, None, replied)
                    sent["initial"] += self.payload_bytes(sizes, contact)["initial"]
                last[client] = server_round + 1
        return Planned(
            initial_bytes=sent["initial"],
            downlink_bytes=sent["down"],
            uplink_bytes=sent["up"],
            trainable_parameters=self.trained_numbers(adapted),
        )

    # The model on the server.

    def server_device(self) -> Placement:
        """Where the server's model is: on the first worker's GPUs where the simulation uses some."""
        return gpus(self.config) if self.config.simulation.gpus_per_worker > 0 else "cpu"

    def server_model(self, data: FederatedData, device: Placement | None = None) -> AdaptedModel:
        """Load the base model with the method's adapters in it; on the device ``meta`` its skeleton.

        Its frozen weights are those of the clients' models, where these are on the same device.
        """
        return self.adapt(shared_base(self.config, data.label_names, device or self.server_device()), self.config)

    # One round, through Flower's interface.

    def learning_rate(self, server_round: int) -> float:
        """Learning rate of a round: the config's or the method's own, by the schedule."""
        base = self.config.client.learning_rate or self.learning_rates[self.config.client.optimizer]
        return learning_rate(self.config.client, base, server_round, self.config.run.rounds)

    def sample(self, server_round: int) -> list[int]:
        """Draw the clients of a round, as ``server.sampling`` says, from the run's seed, the round and its attempt."""
        server, seed = self.config.server, self.config.run.seed
        if self.attempt:
            # Accountants of sampled clients assume that each release drew its own.
            seed = int(np.random.SeedSequence([seed, self.attempt]).generate_state(1)[0])
        privacy = self.config.privacy
        there = whose_turn(self.nodes, self.noise.turn(server_round), privacy.groups)
        fraction = min(1.0, privacy.group_rate(server.fraction_train) * server.over_sampling)
        return get_sampling(server.sampling).sample(there, server_round, seed, fraction)

    def in_turn(self, server_round: int, clients: Sequence[int]) -> list[int]:
        """Return a round's clients in the order in which they are asked: drawn, where not all of them may count."""
        if self.config.server.over_sampling == 1:
            return list(clients)
        rng = np.random.default_rng([self.config.run.seed, server_round, 0x05, self.attempt])
        return [int(client) for client in rng.permutation(clients)]

    @property
    def most_replies(self) -> int:
        """So many replies a round takes."""
        server = self.config.server
        if server.over_sampling == 1:
            return len(self.report.clients)
        return get_sampling(server.sampling).most(len(self.nodes), server.fraction_train)

    @property
    def _complete(self) -> bool:
        """Whether the round has all replies that it takes, so that others are left out."""
        return self.config.server.over_sampling > 1 and len(self.report.metrics) >= self.most_replies

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Address the round's clients."""
        if not self.nodes:
            self.nodes = dict(enumerate(sorted(grid.get_node_ids())))
        self.report = RoundReport(clients=self.sample(server_round), attempt=self.attempt)
        self._record, self._shapes = arrays, {name: tuple(array.shape) for name, array in arrays.items()}
        self.enter(server_round, self.exchange)
        if self.secure.active:
            self._share_keys(group_of(server_round, self.exchange, self.attempt))
        self.arrays = decode(arrays)
        down = {name for name in arrays if self.role(name).down == "round"}
        common = arrays if len(down) == len(arrays) else ArrayRecord({n: a for n, a in arrays.items() if n in down})
        common = recode(common, self.codecs.once, self.codecs.down)
        self._sent = self.arrays if common is arrays else self.arrays | self.codecs.down.decode(common)
        beside = self.variates.record(self._sent_shapes, self._whole_weight())
        group = group_of(server_round, self.exchange, self.attempt)
        records: dict[Hashable, ArrayRecord] = {}
        sent: dict[Hashable, Arrays] = {}
        contents: dict[Hashable, RecordDict] = {}  # clients that are sent the same share it, as grids can
        messages = []
        self._sent_own = {}
        for client in self.in_turn(server_round, self.report.addressed):
            key, record = None, common
            own = self.client_arrays(client)
            if own is not None:
                if beside:
                    raise self._uncorrected()
                key, part = own
                if key not in records:
                    records[key] = self.codecs.down.encode(part)
                    rounded = self.codecs.down is not self.codecs.once
                    sent[key] = self.codecs.down.decode(records[key]) if rounded else part
                record, self._sent_own[client] = records[key], sent[key]
            settings = self.client_settings(client, server_round) | self.variates.settings(client)
            if self.exchange > 1:
                settings["exchange"] = self.exchange
            if self.attempt:
                settings["attempt"] = self.attempt
            own_records = self.secure.content(client)
            same = (key, tuple(sorted(settings.items())), client if own_records else None)
            if same not in contents:
                said = ConfigRecord({**config, **settings})
                contents[same] = RecordDict({"arrays": record, "config": said, **beside, **own_records})
            messages.append(Message(contents[same], self.nodes[client], MessageType.TRAIN, group_id=group))
        return messages

    def _share_keys(self, group: str) -> None:
        """Let the round's clients exchange keys; those that drop out here are not sent its message."""
        asked = self.report.clients
        if silent := [client for client in asked if client not in self.examples]:
            raise RunError(f"client {silent[0]} did not say its number of examples, by which a secure sum is weighed")
        weights = {client: self.weight(client) for client in asked}
        size = sum(map(math.prod, self._sent_shapes.values()))
        left = self.secure.share_keys(weights, self.nodes, group, size, self.fail)
        self.report.left_out = [client for client in asked if client not in left]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Turn the replies into the next global arrays, as they come."""
        started, self._waited = time.perf_counter(), 0.0
        updates = self._updates(self._read(server_round, replies))
        result = self.aggregate(updates)
        updates.drain()
        self._waited += self.secure.waited
        if self.noise.active and not self.secure.failure:
            self.report.release = self.noise.row()
        if not self.enough_replies():
            result = None
        elif result is None:
            self.report.uncounted = updates.missing
        else:
            result = self._stepped(result)
        record = None
        if result is not None:
            self.report.drift = updates.drift()
            self.replied[server_round] = list(self.report.metrics)
            self.variates.count(group_of(server_round, self.exchange), self._sent_shapes)
            self.variates.turn(self._carry(result))
            record = self._next(result)
        self.report.aggregate_seconds = time.perf_counter() - started - self._waited
        return record, self.mean_metrics()

    def _updates(self, stream: Iterator[Update]) -> Updates:
        """Return the round's updates, or no more of them than what they are combined to."""
        if self.secure.active:
            # Residues have no names: both halves order them by the names of their arrays.
            shapes = dict(sorted(self._sent_shapes.items()))
            return SecureUpdates(stream, self._origin(self._sent, shapes), shapes, self.secure, self.noise)
        if not (self.noise.active or self.aggregator.robust):
            return Updates(stream, self._start())
        start = self._origin(self._sent, self._sent_shapes)
        if self.noise.active:
            return NoisyUpdates(stream, start, self._sent_shapes, self.noise)
        return CombinedUpdates(stream, start, self._sent_shapes, self.aggregator)

    def _stepped(self, result: Arrays) -> Arrays | None:
        """Let the server optimiser step to an aggregate; None where a number is not finite."""
        if is_finite(result.values()):
            mean = {name: array for name, array in result.items() if name in self.arrays and self.role(name).trained}
            current, before = self.arrays, deepcopy(self.optimizer.state_dict())
            if self.optimizer.stateful and not self.persistent:
                # The mean may be written in other coordinates than what came before it.
                carry = self._carry(result)
                current = carry(current)
                self.optimizer.turn(carry)
            result = result | self.optimizer.step(current, mean)
            if is_finite(result[name] for name in mean):
                return result
            self.optimizer.load_state_dict(before)
        self.report.uncounted = "the aggregate is not finite"
        return None

    def _carry(self, result: Arrays) -> Callable[[Arrays], Arrays]:
        """Return what carries moves from the coordinates of the global arrays into those of what comes after them."""
        head = [name for name, kind in self._kinds.items() if kind == HEAD]
        return partial(carried, type(self), before=self.arrays, after=self.arrays | result, head=head)

    def _start(self) -> torch.Tensor | None:
        """What all clients start from as one vector; None where shapes, or what goes up, differ by client."""
        if any(self.client_shapes(client) is not self._sent_shapes for client in self.report.clients):
            return None
        moves = any(self.role(name).up == "update" for name in self._sent_shapes)
        parts = [self._sent[name].reshape(-1) for name in self._sent_shapes]
        start = torch.cat(parts) if parts else torch.zeros(0)
        return torch.zeros_like(start) if moves else start

    def _read(self, server_round: int, replies: Iterable[Message]) -> Iterator[Update]:
        """Yield what may be used of each reply, in client order."""
        group = group_of(server_round, self.exchange, self.attempt)
        if self.config.server.over_sampling == 1:
            yield from self._read_each(self.valid_replies(replies, group))
            return
        # Which replies count is known only by the order in which they came.
        counted = sorted(self._read_each(self.valid_replies(replies, group)), key=lambda update: update.client)
        self.report.metrics = dict(sorted(self.report.metrics.items()))
        yield from counted

    def _read_each(self, replies: Iterable[tuple[int, Message]]) -> Iterator[Update]:
        """Read replies one by one; one that is refused costs its client its place."""
        waiting = time.perf_counter()
        for client, message in replies:
            self._waited += time.perf_counter() - waiting
            try:
                shapes = self.client_shapes(client)
                self.check_reply(client, message)
                vector, metrics = self._vector(client, message, shapes)
                change = self.variates.read(message, shapes)
                self.report.metrics[client] = metrics
                update = Update(client, self.weight(client), vector, shapes, metrics)
                if not self.secure.active:
                    self.check_update(update)
            except ReplyError as error:
                self.report.metrics.pop(client, None)
                self.fail(client, ClientErrorCode.REPLY, f"the reply is refused: {error}")
            else:
                self.variates.add(client, update.weight, change)
                yield update
            waiting = time.perf_counter()
        self._waited += time.perf_counter() - waiting

    def _vector(self, client: int, message: Message, shapes: Shapes) -> tuple[torch.Tensor, MetricRecord]:
        """Return the numbers of a reply, as values or masked, and its metrics.

        Raises
        ------
        ReplyError
        """
        mechanism = mechanism_of(self.config)
        if self.secure.active:
            return read_masked(message, sum(map(math.prod, shapes.values())), mechanism)
        beside = (VARIATES,) if self.variates.active else ()
        vector, metrics = read_update(message, shapes, self.codecs.up, mechanism=mechanism, beside=beside)
        return self._bounded(client, self._values(client, vector.to(self._dtype), shapes), shapes), metrics

    def _values(self, client: int, vector: torch.Tensor, shapes: Shapes) -> torch.Tensor:
        """Turn what a client sent into what the method's table says, where the wire takes updates alone.

        Raises
        ------
        ReplyError
            If a sum is not finite.
        """
        if not self.codecs.updates:
            return vector
        start = self.sent_to(client)
        values = {n: a + start[n] if self.role(n).up == "value" else a for n, a in named(vector, shapes).items()}
        found = torch.cat([torch.empty(0, dtype=self._dtype), *(array.reshape(-1) for array in values.values())])
        check_numbers(found, shapes)
        return found

    def _bounded(self, client: int, vector: torch.Tensor, shapes: Shapes) -> torch.Tensor:
        """Shorten a move that is longer than ``server.max_update_norm``."""
        bound = self.config.server.max_update_norm
        if bound is None:
            return vector
        start = self._origin(self.sent_to(client), shapes).double()
        move = vector.double() - start
        return (start + move * min(1.0, bound / max(float(move.norm()), 1e-300))).to(vector.dtype)

    def _origin(self, sent: Mapping[str, torch.Tensor], shapes: Shapes) -> torch.Tensor:
        """Return what a client's moves are measured from, as one vector: what it was sent, or 0 for what is a move."""
        parts = [
            (torch.zeros(shape) if self.role(name).up == "update" else sent[name]).reshape(-1)
            for name, shape in shapes.items()
        ]
        return torch.cat([torch.zeros(0, dtype=self._dtype), *parts]).to(self._dtype)

    def check_update(self, update: Update) -> None:
        """Refuse an update for what its numbers make.

        Raises
        ------
        ReplyError
        """

    def _next(self, result: Arrays) -> ArrayRecord:
        """Encode what changed together with what stays, in the order of what was sent; increments follow."""
        names = [name for name in self._record if name in result or name in self.arrays]
        if all(name in result for name in names) and len(result) == len(names):
            return encode({name: result[name] for name in names}, self._dtype)
        return encode({name: self.arrays[name] for name in names} | result, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return self.codecs.once.dtype

    @property
    def private(self) -> bool:
        """Whether clients say what privacy they spend."""
        return mechanism_of(self.config).is_private

    def weight(self, client: int) -> float:
        """Return a client's weight before normalisation: its number of examples."""
        examples: Any = self.examples.get(client)
        return float(self.report.metrics[client]["num-examples"] if examples is None else examples)  # type: ignore[arg-type]

    def _whole_weight(self) -> float:
        """Return the weight of all clients of the run together; 1 where none is known before they reply."""
        return math.fsum(self.weight(client) for client in self.examples) or 1.0

    def _uncorrected(self) -> InputError:
        remedy = f"needs arrays of one shape, but clients of {self.name} have their own here; use none"
        return InputError("client.correction", self.config.client.correction, remedy)

    def enough_replies(self) -> bool:
        """Whether the round counts; else its report says why not."""
        if self.secure.failure:
            self.report.uncounted = self.secure.failure
            return False
        if self.noise.active:
            return True  # leaving a round out would tell how many clients were drawn
        count, least = len(self.report.metrics), self.config.server.min_replies
        if count < least:
            few = f"{count} replies are fewer than server.min_replies = {least}"
            self.report.uncounted = few if self.report.clients else "no client was drawn"
        return count >= least

    def valid_replies(self, replies: Iterable[Message], group: str = "") -> Iterable[tuple[int, Message]]:
        """Yield (client, reply) in client order, one reply a client; log and count the failures.

        With over-sampling it is the order in which they come, and ends once the round has the replies that it takes.
        Real nodes are then not waited for; in simulation the others are read too, as they were sent.

        Parameters
        ----------
        replies : iterable of Message
        group : str
            The round, as the messages name it; "" takes replies to any.

        Raises
        ------
        RoundError
            If every client of the round failed, unless it was one of several: one alone must not end the run.
        """
        asked = {self.nodes[client]: client for client in self.report.addressed}
        answered = set()
        found: Iterable[Message] = first_replies(replies, asked, group, log.warning)
        for reply in in_client_order(found, list(asked)) if self.config.server.over_sampling == 1 else found:
            client = asked[reply.metadata.src_node_id]
            answered.add(client)
            if self.on_reply is not None:
                self.on_reply(client)
            if reply.has_error():
                self.fail(client, reply.error.code, reply.error.reason or "")
            elif self._complete:
                self.report.surplus.append(client)
            else:
                yield client, reply
            if self.waits and self._complete:
                break
        for client in self.report.addressed:
            if client not in answered and self._complete and self.waits:
                self.report.surplus.append(client)
            elif client not in answered:
                self.fail(client, NO_REPLY, "no reply within the timeout")
        self.report.surplus.sort()
        if len(self.report.failed) < len(self.report.clients):
            self._failing.clear()
        elif self.report.clients and not (self.waits and self.report.only_absent):
            self._failing |= set(self.report.clients)
            if len(self._failing) >= min(2, len(self.nodes)):
                said = self.report.failed[0]["error"].strip().rpartition("\n")[2]  # a traceback's last line
                raise RoundError(f"every client of the round failed; the first said: {said} (run.log has all)")

    def fail(self, client: int, code: int, error: str) -> None:
        """Count and log a client's failure."""
        error = plain_text(error, LONGEST_REASON)
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
        """Ask ``server.fraction_evaluate`` of the clients, on test examples of their own; nobody by default."""
        self.arrays = decode(arrays)  # a client's own arrays are made of them
        return evaluation_messages(self, server_round, arrays, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the metrics of the clients' examples together, from their sums; :attr:`evaluation` has the rest."""
        return read_evaluations(self.evaluation, replies)


def get_strategy(name: str) -> type[FederatedStrategy]:
    """Return the strategy of a method name.

    Raises
    ------
    InputError
        If there is no such method; close names are suggested.
    """
    method = get_method(name)
    if not issubclass(method, FederatedStrategy):
        raise InputError("method.name", name, "is no strategy; let its class derive from FederatedStrategy")
    return method
