"""The client that a message is for: one with a share of a simulation's data, or a real node with its own file."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedlora.alignment import aligned
from fedlora.arrays import Arrays
from fedlora.clients.resources import client_data, run_config
from fedlora.communication.wire import decode, encode
from fedlora.config import Config
from fedlora.data.tokens import TokenTable
from fedlora.errors import InputError, PolicyError, StaleError
from fedlora.methods import get_method
from fedlora.node.local_node import LocalNode
from fedlora.node.names import NODE_FILE, NODE_RECORD
from fedlora.node.node_ledger import Charge
from fedlora.node.room import OWN, make_room
from fedlora.privacy import Ledger, PrivacyPlan
from fedlora.privacy.calibration import local_steps
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.roles import HOME, Exchange

log = logging.getLogger("fedlora")

_MOST_ATTEMPTS = 10**6
"""Of one round, over all resumes of a run."""


class Participant(ABC):
    """One client of a message with arrays, to train or to evaluate.

    Attributes
    ----------
    config : Config
        The run's, as it holds for this client in this exchange.
    client : int
        Its number in the run.
    exchange : Exchange
        What the message is part of.
    number : int
        Of the exchange in its round, from 1.
    rows : ndarray of int
        Its examples in the token table.
    examples : int
        How many of them, or of its persons where steps draw these, a step draws from.
    plan : PrivacyPlan or None
        Its DP-SGD, if any.
    starts : bool
        Whether the client makes a start: its method says that clients do, and nothing came down to it.
    secret : bool
        Whether noise and sampling come from the operating system's entropy instead of the run's seed.
    on_step : callable, optional
        To be called before each step.
    context : Context
        Flower's; its state lasts from message to message.
    """

    context: Context
    config: Config
    client: int
    exchange: Exchange
    number: int
    rows: np.ndarray
    examples: int
    plan: PrivacyPlan | None
    starts: bool
    secret: bool
    on_step: Callable[[], None] | None = None

    @abstractmethod
    def admit(self, held: ExitStack) -> None:
        """Refuse a round of training that the ledger or the owner does not allow.

        Parameters
        ----------
        held : ExitStack
            Closed once the reply is made.

        Raises
        ------
        BudgetError, StaleError
        """

    def own_test(self) -> tuple[TokenTable, np.ndarray]:
        """Return the table and the rows of it that the client tests on."""
        return client_data(self.config).own_test(self.client)

    @abstractmethod
    def make_room(self, needed: int, *used: Path) -> None:
        """Make room in the cache for that many bytes, beside what is in use there."""

    @abstractmethod
    def charge_start(self) -> None:
        """Charge the start that the client is about to make from its examples, if it is private."""

    def charge_update(self) -> None:
        """Charge the noisy update that is about to leave, where a ledger of the client's own counts it."""
        return

    @abstractmethod
    def own(self, sort: str = HOME) -> Arrays:
        """Return what the client keeps of a sort, as its last round of this run left it; none at first."""

    @abstractmethod
    def keep(self, arrays: Arrays, sort: str = HOME) -> None:
        """Keep arrays for the client's next round of this run, in place of all others of their sort.

        Parameters
        ----------
        arrays : dict of str to Tensor
            Of one dtype.
        sort : str
            A word of small letters: what the arrays are kept for.
        """

    @abstractmethod
    def settle(self, steps: int) -> Ledger | None:
        """Charge steps that are not charged yet; return the run's ledger (None without privacy)."""


class SimulatedClient(Participant):
    """A client whose partition of the run's data, and whose ledger, Flower's context holds."""

    def __init__(self, message: Message, context: Context) -> None:
        self.context = context
        config = run_config(context.run_config)
        self.number, self.exchange = _exchange(config, message)
        self.client = int(context.node_config["partition-id"])
        data = client_data(config)
        self.rows = data.partition[self.client]
        self.examples = data.drawn_from(self.client, config.privacy)
        units = data.units_of(self.client, config.privacy)
        self.plan = _plan_of(message, mechanism_of(config).plan(config, self.examples, units))
        self.config = self.exchange.training(config)
        self.starts = _starts(self.exchange, message)
        # Only the simulation's own grid says so; a run's config, which a server sends, cannot.
        self.secret = self.plan is not None and not context.node_config.get("simulated", False)

    def admit(self, held: ExitStack) -> None:
        """Check the run's ceiling."""
        if self.plan is not None:
            steps = local_steps(self.config, self.examples)
            self._ledger(self.plan).check(self.plan, steps, self.starts)

    def make_room(self, needed: int, *used: Path) -> None:
        """Do nothing: the cache is the user's own."""

    def charge_start(self) -> None:
        """Do nothing: it is charged once it leaves, with the steps."""

    def own(self, sort: str = HOME) -> Arrays:
        """Read the client's Flower state."""
        record = self.context.state.get(sort)
        return decode(record) if isinstance(record, ArrayRecord) else {}

    def keep(self, arrays: Arrays, sort: str = HOME) -> None:
        """Write to the client's Flower state."""
        self.context.state[sort] = encode(arrays, next(iter(arrays.values())).dtype)

    def settle(self, steps: int) -> Ledger | None:
        """Charge what was released."""
        if self.plan is None:
            return None
        ledger = self._ledger(self.plan)
        ledger.charge(self.plan, steps, self.starts)
        self.context.state["ledger"] = ConfigRecord(ledger.to_record())
        return ledger

    def _ledger(self, plan: PrivacyPlan) -> Ledger:
        if "ledger" in self.context.state:
            return Ledger.from_record(self.context.state["ledger"])
        return Ledger(plan.accountant, plan.delta)


class NodeClient(Participant):
    """A real node: its owner's file, policy and ledger, whatever config the server sends."""

    def __init__(self, message: Message, context: Context) -> None:
        self.context = context
        self.node, about = open_node(context), node_record(message)
        self.federation, self.run = str(about["federation"]), run_of(message, context)
        label_names = self.node.ledger.label_names(self.federation, self.run)
        evaluating = evaluates(message)
        # With another config a server could have the owner's rows tokenised again without asking what the node holds.
        self.node.ledger.check_config(self.run, sent_digest(context))
        self.turn = _turn(sent_config(context), message)
        if not evaluating:
            self.node.ledger.check_round(self.run, self.turn)
        if evaluating:
            self._admit_evaluation(sent_config(context))
        config = self.node.own_config(sent_config(context), label_names)
        self.number, self.exchange = _exchange(config, message)
        self.client = int(about["client"])
        make_room(self.node.config, used=self._kept())
        data = client_data(config)
        make_room(self.node.config, used=(data.folder, *self._kept()))
        self.folder, self.rows = data.folder, data.partition[0]
        self.examples = data.drawn_from(0, config.privacy)
        plan = self.node.admit(config, self.examples, data.units_of(0, config.privacy))
        self.plan = _plan_of(message, plan)
        self._update = self.node.update_charge(config)
        self.config = self.exchange.training(config)
        self.starts = _starts(self.exchange, message)
        self.secret = self.plan is not None
        # By a clock that does not jump.
        self._deadline = time.monotonic() + message.metadata.created_at + message.metadata.ttl - time.time()
        self._charge: Charge | None = None

    def admit(self, held: ExitStack) -> None:
        """Hold the owner's ledger for the round; from here on all is charged before it is taken, or leaves.

        Where the update gets noise, it alone is charged: nothing else of the steps leaves.
        """
        steps = local_steps(self.config, self.examples) if self._update is None else 0
        also = self.plan.start if self.starts and self.plan is not None else []
        also = also if self._update is None else [*also, self._update]
        admitted = self.node.ledger.round(self.federation, self.run, self.turn, self.plan, steps, also)
        self._charge = held.enter_context(admitted)
        self.on_step = self._step

    def _admit_evaluation(self, sent: Config) -> None:
        """Refuse an evaluation that the described config or the owner does not allow; nothing is read for it."""
        if not sent.server.fraction_evaluate:
            raise StaleError("by the config that the run was described with no client evaluates")
        self.node.ledger.count_evaluation()

    def own_test(self) -> tuple[TokenTable, np.ndarray]:
        """Return the rows that the owner's file sets apart, or those of the owner's file of test examples.

        Raises
        ------
        PolicyError
            If they are so few that a sum would tell of single ones.
        """
        table, rows = client_data(self.config).own_test(0)
        least = self.node.config.policy.min_test_examples
        if len(rows) < least:
            raise PolicyError("min_test_examples", least, len(rows))
        return table, rows

    def make_room(self, needed: int, *used: Path) -> None:
        """Keep what runs leave on the disk within what the owner allows."""
        make_room(self.node.config, needed, (self.folder, *self._kept(), *used))

    def _step(self) -> None:
        """Charge a step, unless the update is charged; refuse it once the server's timeout has passed."""
        self._check_deadline()
        if self._update is None:
            assert self._charge is not None
            self._charge.step()

    def _check_deadline(self) -> None:
        """Refuse what would be lost.

        Raises
        ------
        StaleError
        """
        if time.monotonic() > self._deadline:
            raise StaleError("the server's timeout is over; what is left is not done")

    def charge_start(self) -> None:
        """Write the start to the disk before it reads an example."""
        assert self._charge is not None
        for sigma, rate, _ in self.plan.start if self.plan is not None else ():
            self._charge.take(sigma, rate)

    def charge_update(self) -> None:
        """Write the update to the disk before it leaves."""
        if self._update is not None:
            self._check_deadline()
            assert self._charge is not None
            self._charge.take(*self._update[:2])

    def own(self, sort: str = HOME) -> Arrays:
        """Read the node's directory: Flower's node state ends with a restart."""
        path = self._own(sort)
        try:
            return {n: aligned(a) for n, a in load(path.read_bytes()).items()}
        except FileNotFoundError:
            return {}
        except SafetensorError:  # cut short: the node may have lost its power
            log.warning("%s cannot be read: what the run kept there is lost", path)
            return {}

    def keep(self, arrays: Arrays, sort: str = HOME) -> None:
        """Write to the node's directory, within what the owner gives runs on the disk."""
        content = save(arrays)
        self.make_room(len(content))
        write_whole(self._own(sort), content)

    def _own(self, sort: str) -> Path:
        """Return the file of a sort of this run's arrays."""
        name = hashlib.sha256(self.federation.encode()).hexdigest()
        return self.node.config.directory / OWN / f"{name}{'' if sort == HOME else f'.{sort}'}.safetensors"

    def _kept(self) -> tuple[Path, ...]:
        """Return all files of this run's arrays."""
        home = self._own(HOME)
        return tuple(home.parent.glob(f"{home.stem}.*"))

    def settle(self, steps: int) -> Ledger | None:
        """Check that the steps were charged, no more and no fewer."""
        assert self._charge is not None
        if self._update is None:
            self._charge.check_taken(steps)
        return None if self.plan is None else self.node.ledger.of_federation(self.federation, self.plan)


def participant(message: Message, context: Context) -> Participant:
    """Return the client that a message is for."""
    return NodeClient(message, context) if is_node(context) else SimulatedClient(message, context)


def check_described(message: Message, context: Context) -> Config:
    """Return the config of the run that a message is of, as it was sent.

    Raises
    ------
    StaleError
        If the run was not described to a real node, or with another config, or has ended.
    """
    if not is_node(context):
        return run_config(context.run_config)
    ledger, run = open_node(context).ledger, run_of(message, context)
    ledger.label_names(str(node_record(message)["federation"]), run)
    ledger.check_config(run, sent_digest(context))
    return sent_config(context)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file of arrays so that readers see the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def evaluates(message: Message) -> bool:
    """Whether a message asks for an evaluation, and not for training."""
    return message.metadata.message_type.partition(".")[0] == MessageType.EVALUATE


def _exchange(config: Config, message: Message) -> tuple[int, Exchange]:
    """Return the exchange that a message is of, and its number in the round.

    Raises
    ------
    StaleError
        If the round has no such exchange.
    """
    settings: Any = message.content["config"]
    number, server_round = int(settings.get("exchange", 1)), int(settings["server-round"])
    exchanges = get_method(config.method.name).exchanges_of(config, server_round)
    if not 1 <= number <= len(exchanges):
        raise StaleError(f"round {server_round} has no exchange {number}")
    return number, exchanges[number - 1]


def attempt_of(config: Config, message: Message) -> int:
    """Return how often the round of a message was repeated.

    Raises
    ------
    StaleError
        If the run repeats no rounds, or nobody repeats one so often.
    """
    settings: Any = message.content["config"]
    attempt = int(settings.get("attempt", 0))
    if not 0 <= attempt < _MOST_ATTEMPTS or (attempt and config.server.max_round_retries is None):
        raise StaleError(f"the run has no attempt {attempt} at a round")
    return attempt


def _turn(config: Config, message: Message) -> int:
    """Number the exchanges of a run, as a node's ledger orders them; rounds, where each has one exchange.

    Where rounds may be repeated, each has room for the exchanges of its attempts.
    """
    settings: Any = message.content["config"]
    method, server_round = get_method(config.method.name), int(settings["server-round"])
    if not server_round:
        return _exchange(config, message)[0]
    attempt = attempt_of(config, message)
    if method.has_one_exchange():
        before, exchanges, number = server_round - 1, 1, 1
    elif server_round > config.run.rounds:
        raise StaleError(f"the run has no round {server_round}")
    else:
        before = sum(len(method.exchanges(config, r)) for r in range(1, server_round))
        exchanges, number = len(method.exchanges(config, server_round)), _exchange(config, message)[0]
    room = 1 if config.server.max_round_retries is None else _MOST_ATTEMPTS
    return len(method.start_exchanges(config)) + before * room + attempt * exchanges + number


def _plan_of(message: Message, plan: PrivacyPlan | None) -> PrivacyPlan | None:
    """Return a client's plan for the exchange of a message."""
    settings: Any = message.content["config"]
    return plan.for_start() if plan is not None and not int(settings["server-round"]) else plan


def _starts(exchange: Exchange, message: Message) -> bool:
    arrays: Any = message.content["arrays"]
    return not len(arrays) and any(role.made_by == "client" for role in exchange.roles.values())


def is_node(context: Context) -> bool:
    """Tell whether the client is a real node."""
    return NODE_FILE in context.node_config


def open_node(context: Context) -> LocalNode:
    """Return the node whose file Flower's node config names."""
    return LocalNode.open(str(context.node_config[NODE_FILE]))


def node_record(message: Message) -> Any:
    """Return what a server says to a real node beside the config of the round."""
    if NODE_RECORD not in message.content:
        raise StaleError("the message says nothing of its federation")
    return message.content[NODE_RECORD]


def sent_config(context: Context) -> Config:
    """Return the config that a server sent to a real node: TOML text, since a path would be one on the owner's disk."""
    text = str(context.run_config["config"])
    if "\n" not in text:
        raise InputError("config", text, "is no TOML text; submit runs with fedlora run CONFIG --on NAME")
    return run_config(context.run_config)


def sent_digest(context: Context) -> str:
    """Return the SHA-256 of the config that a server sent to a real node."""
    return hashlib.sha256(sent_config(context).to_toml().encode()).hexdigest()


def run_of(message: Message, context: Context) -> str:
    """Return the SuperLink's id of the run; the message must be of the run that it came with, and not too old."""
    meta = message.metadata
    if meta.run_id != context.run_id:
        raise StaleError(f"a message of run {meta.run_id} came in run {context.run_id}")
    if time.time() > meta.created_at + meta.ttl:
        raise StaleError(
            f"the message waited longer than its {meta.ttl:.0f} s, or the clocks of node and server differ"
        )
    return str(context.run_id)
