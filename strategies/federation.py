"""One federation from start to end, on whatever Grid there is."""

from __future__ import annotations

import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.communication.broadcast import Broadcast
from fedlora.communication.meter import MeteredGrid
from fedlora.communication.parts import INITIAL, Chain, Parts
from fedlora.communication.wire import COUNTED, decode, encode, wire_dtype
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.errors import InputError, RoundError, RunError
from fedlora.privacy.accountants import get_accountant
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.results.finished import RunResult
from fedlora.results.folder import RunFolder
from fedlora.results.identity import check_model, hash_weights, note_environment
from fedlora.roles import Roles
from fedlora.simulation import SimulatedGrid
from fedlora.strategies.base import FederatedStrategy, RoundReport
from fedlora.strategies.best_round import KeepBest
from fedlora.strategies.callbacks import Callback, Display, Network, Outcome, Plot, Progress, Saved, Trackers
from fedlora.strategies.evaluation import stale_kinds
from fedlora.strategies.gathering import gather_start
from fedlora.strategies.guest import Guest
from fedlora.strategies.lost_replies import attempt_rows, charge_unused
from fedlora.strategies.nodes import AddressedGrid, Roster, in_round, told
from fedlora.strategies.personal import export_own
from fedlora.strategies.summary import (
    environment,
    fairness,
    memory_notes,
    privacy_rows,
    round_line,
    round_seconds,
    summarise,
)
from fedlora.tasks import get_task
from fedlora.timeline import phase
from fedlora.training import evaluate_clients
from fedlora.training.answering import score_answers
from fedlora.training.soundness import check_packing, check_sound
from fedlora.transport import bases

log = logging.getLogger("fedlora")

RESIDUAL = "residual"
"""Name of the part that increments are added to."""

UNSCORED = (
    "clients keep personal models, which nobody scores: set server.fraction_evaluate, and data.client_test in a "
    "simulation, to have them scored"
)
"""Note of a run of personalised models that no client evaluates."""


@dataclass
class Totals:
    """Sums over rounds and restarts."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    epsilon: dict[str, list[float]] = field(default_factory=dict)  # client -> [epsilon, delta]


class Federation:
    """A run: who takes part, the model on the server, the wire, the rounds and the result.

    Parameters
    ----------
    config : Config
        Resolved.
    grid : Grid
        A simulation's, or Flower's own in deployment.
    folder : RunFolder
        New, or opened to resume.
    data : FederatedData
        For evaluation on the server, and for starts that read public or pooled data.
    method : FederatedStrategy
        Of the config's method: says what is trained, how it starts and what its formula is.
    training : Strategy, optional
        Configures and aggregates the rounds instead of ``method``; any Flower Strategy.
    progress : Progress, optional
    callbacks : sequence of Callback
        Beside the run's own; called after the checkpoint.
    started : float, optional
        ``time.perf_counter()`` when the run began, if that was before this call.
    simulated : bool
        Whether ``data`` holds the examples that the clients train on.

    Attributes
    ----------
    done : int
        Rounds that are finished.
    arrays : ArrayRecord
        The global arrays that rounds change.
    parts : Parts
        Those that clients keep.
    failed_attempts : list of dict
        At the round that is under way: why each failed, and which clients.
    """

    def __init__(
        self,
        config: Config,
        grid: Grid,
        folder: RunFolder,
        data: FederatedData,
        method: FederatedStrategy,
        *,
        training: Strategy | None = None,
        progress: Progress | None = None,
        callbacks: Sequence[Callback] = (),
        started: float | None = None,
        simulated: bool = False,
    ) -> None:
        self.clock = started or time.perf_counter()
        self.config, self.grid, self.folder, self.data, self.method = config, grid, folder, data, method
        self.simulated, self.checkpoint, self.progress = simulated, folder.checkpoint, progress or Progress()
        self.best = KeepBest(get_task(config.model.task), config.server.early_stopping_patience)
        shown = Display(self.progress)
        self.callbacks = [Network(), self.best, Saved(), Trackers(), shown, Plot(), *callbacks]
        own = training is None or isinstance(training, FederatedStrategy)
        if not own and (method.aggregator.robust or config.server.max_update_norm is not None):
            remedy = (
                "combines the updates of a method; a strategy that was brought along combines them itself: use mean"
            )
            raise InputError("server.aggregator", config.server.aggregator, f"{remedy}, and no max_update_norm")
        if not own and method.noise.active:
            remedy = "adds noise to a method's own mean; a custom strategy aggregates without it"
            raise InputError("privacy.mode", config.privacy.mode, remedy)
        if not own and method.secure.active:
            remedy = "hides the updates that a custom strategy would aggregate; leave it out"
            raise InputError("server.secure_aggregation", True, remedy)
        self.rounds: Any = (training or method) if own else Guest(training, method)  # type: ignore[arg-type]
        # Objects with a state, by their key in the checkpoint.
        self.stateful: dict[str, Any] = {"strategy": self.rounds}
        # The method, and the strategy that runs the rounds in its place, if that is a FederatedStrategy too.
        self.halves = [method]
        if isinstance(self.rounds, FederatedStrategy):
            self.stateful["optimizer"] = self.rounds.optimizer
            self.stateful["variates"] = self.rounds.variates
            self.stateful["noise"] = self.rounds.noise
            self.halves += [] if self.rounds is method else [self.rounds]
        self.totals = Totals()
        self.failed_attempts: list[dict[str, Any]] = []
        self.dtype = wire_dtype(config.model.dtype)

    def run(self) -> RunResult:
        """Run, or go on with, the federation.

        Raises
        ------
        InputError
            If a private run is resumed whose clients' ledgers are gone, any run whose base model is another now, or the
            model's examples depend on each other.
        """
        self.enlist()
        if self.simulated:
            # Asked last, since their workers may still be starting; they have no names that the model depends on.
            self.load()
            began = time.perf_counter()
            self.gather()
            self.totals.seconds["load"] += time.perf_counter() - began
        else:
            self.gather()
            self.load()
        self.connect()
        if self._helped:
            self.roster.refresh()
            self._present()
            gather_start(self)
            self.begin(time.perf_counter())
        self.rounds.summary()
        try:
            return self._run_rounds()
        finally:
            for callback in self.callbacks:
                callback.close(self)

    def _run_rounds(self) -> RunResult:
        """Run the rounds that are left, and write the result."""
        for callback in self.callbacks:
            callback.on_start(self)
        with phase("rounds", "rounds", self.config.run.rounds, self.done) as rounds:
            while self.done < rounds.total and not self.best.stops:
                self.round(self.done + 1)
                rounds.advance()
        if self.done < self.config.run.rounds:
            note = f"stopped early after round {self.done}: validation prefers round {self.best.round}"
            self.folder.tell(note)
            self.progress.on_note(note)
        return self.finish()

    def enlist(self) -> None:
        """Open the list of the clients, and the parts that they keep."""
        known = self.checkpoint.get("names", [])
        key = str(self.checkpoint.get("federation") or uuid.uuid4().hex)
        self.roster = Roster(self.grid, self.config, self.data.label_names, key, known, self.method.refuses)
        self.parts = Parts(key)
        self.parts.blocks = self.method.client_blocks

    @phase("gather", "looking for the clients")
    def gather(self) -> None:
        """Discover the clients, and number them."""
        self.roster.discover()
        nodes, real = self.roster.nodes, self.roster.real
        if not real and len(nodes) < len(self.data.partition):
            clients = len(self.data.partition)
            remedy = f"{len(nodes)} nodes are online, and every client needs one; give flwr run --federation-config"
            raise InputError("data.partition.clients", clients, f"{remedy} num-supernodes={clients}")
        if self.folder.resumed and self.method.private and not (self.simulated or real):
            # Flower's runtimes keep a client's state for one of their runs: epsilon would begin at 0 again.
            remedy = "the clients' ledgers ended with Flower's run; run anew with another output, or with fedlora run"
            raise InputError("resume", True, remedy)
        # Kept at once: what nodes spend in a round that is lost belongs to this run all the same.
        self.checkpoint["federation"], self.checkpoint["names"] = self.roster.federation, self.roster.names
        self.checkpoint.commit()
        for half in self.halves:
            half.nodes, half.names, half.examples = nodes, self.roster.names, self.roster.examples
            half.replied, half.on_reply = self.method.replied, self.progress.on_client
            half.noise.prepare(len(nodes), real)
            half.secure = self.method.secure  # the meter's formula asks the method
        self.method.secure.prepare(len(nodes))

    def load(self) -> None:
        """Load the model on the server, and put the arrays into it if they do not wait for clients to help."""
        config, method = self.config, self.method
        with phase("server model", "loading the model"):
            self.adapted: AdaptedModel = method.server_model(self.data)
        self._check_model()
        note_environment(self.folder, environment(config))
        personalised = method.personalised(config)
        unscored = [UNSCORED] if personalised and not config.server.fraction_evaluate else []
        if personalised and self.data.questions is not None:
            unscored.append("evaluation.kind is not used: clients keep personal models")
        for note in (*self.data.notes, *self.adapted.notes, *method.codecs.notes, *unscored):
            self.folder.tell(note)
        for note in self.folder.notes:
            self.progress.on_note(note)
        if mechanism_of(config).is_private and (note := get_accountant(config.privacy.accountant).note):
            log.warning(note)
        if isinstance(self.grid, SimulatedGrid):
            self.grid.prepare(self.adapted.independent)
        for half in self.halves:
            half.know(self.adapted)
        relative = bases(type(method), self.adapted.arrays(), self.adapted.head_names)
        numbers = method.trained_numbers(self.adapted), sum(array.numel() for array in relative.values())
        for note in memory_notes(config, *numbers, self.dtype.itemsize):
            log.info(note)
        self.done = int(self.checkpoint.get("round", 0))
        if self._helped:
            self.totals.seconds["load"] += time.perf_counter() - self.clock
        else:
            self.begin(self.clock)

    def _check_model(self) -> None:
        """Refuse a model whose examples depend on each other, and on resume one with other weights."""
        config, table = self.config, self.data.train
        digests = hash_weights(self.adapted)  # by threads, while examples are compared
        if mechanism_of(config).clips_examples and self.adapted.stacked_layers():
            # Clients measure it too; here the run ends before anybody is asked.
            check_sound(self.adapted, config, table.pad_token_id)
        elif config.data.packing and table.task.packs and self.adapted.stacked_layers():
            check_packing(self.adapted, config, table.pad_token_id)
        with phase("digest", "hashing the model"):
            self.adapted.digests = digests()
        check_model(self.folder, config, self.adapted)

    @property
    def _helped(self) -> bool:
        """Whether the run is before its first round, and clients help to make the start."""
        return not self._begun and bool(self.method.start_exchanges(self.config))

    @property
    def _begun(self) -> bool:
        """Whether the checkpoint holds arrays: those of a round, or of a failed attempt at the first."""
        return self.checkpoint.get("round") is not None

    def begin(self, since: float) -> None:
        """Put the arrays into the model: a start, which is evaluated, or the checkpoint's. It loads since then."""
        method, personalised = self.method, self.method.personalised(self.config)
        frozen, changing = self._restore() if self._begun else self._begin()
        self.adapted.set_shared(frozen | changing)
        self.adapted.set_residual(self.residual)
        # As they arrive: clients compare digests.
        self.parts.set(INITIAL, decode(encode(frozen, self.dtype)), 0)
        # In the model's order, which is that of the clients' replies; a file has another.
        order = [name for name in self.adapted.names(method.changing()) if name in changing]
        self.arrays = encode({name: changing[name] for name in order} | changing, self.dtype)
        self._keep_stale(self.done)
        self.totals.seconds["load"] += time.perf_counter() - since
        if not self.done:
            began = time.perf_counter()
            scored = self.config.server.evaluate_start and not personalised
            with phase("start evaluation"):
                start = method.evaluate(self.adapted, self.data, 0) | self._score_answers() if scored else {}
            self.checkpoint["start"] = start
            self.totals.seconds["evaluate"] += time.perf_counter() - began

    @phase("start arrays", "making the start")
    def _begin(self) -> tuple[Arrays, Arrays]:
        """Make the start, divided into what rounds change and what they do not."""
        start = self.method.start_arrays(self.adapted, self.data) | self.adapted.arrays(self.adapted.head_names)
        changing = self.method.changing()
        moves = {name for name in start if self.method.kind(name) in changing}
        frozen = {name: array for name, array in start.items() if name not in moves}
        self.checkpoint.set_arrays("frozen", frozen)
        if self.method.gathered:
            self.checkpoint.set_arrays("gathered", {})  # once the first round is committed, nothing asks for them
        return frozen, {name: array for name, array in start.items() if name in moves}

    def _restore(self) -> tuple[Arrays, Arrays]:
        """Return what rounds do not change, and what they do, as the checkpoint holds them."""
        saved = self.checkpoint
        self.totals.seconds.update(saved.get("seconds"))
        self.totals.epsilon.update(saved.get("epsilon"))
        self.failed_attempts = saved.get("failed_attempts", [])
        self.parts.load_state_dict(saved.get("parts"))
        self.method.replied.update({int(r): clients for r, clients in saved.get("replied", {}).items()})
        if saved.get("chain"):
            self.parts.chains[RESIDUAL] = Chain.from_arrays(saved.get_arrays("chain") or {}, saved.get("chain"))
        for key, owner in self.stateful.items():
            owner.load_state_dict(_joined(saved.get(key, {}), saved.get_arrays(key) or {}))
        return saved.get_arrays("frozen") or {}, saved.get_arrays("trained") or {}

    def connect(self) -> None:
        """Put the meter and the parts around the Grid."""
        clients = self.roster.clients()
        formula = self.method.client_formula(self.adapted, self.parts)
        streamed = self.roster.real and self.config.server.over_sampling > 1
        self.meter = MeteredGrid(AddressedGrid(self.grid, streamed), formula, clients)
        self.wire = Broadcast(self.meter, self.parts, clients, self.dtype)
        self.meter.totals.update(self.checkpoint.get("communication", {}))

    def round(self, server_round: int) -> None:
        """Train, aggregate, evaluate and write one round; repeat it where it fails, if the config says so."""
        method, retries = self.method, self.config.server.max_round_retries
        before: list[RoundReport] = []  # of attempts that failed
        for left in range(retries or 0, -1, -1):
            reports, aggregated, mean = self._attempt(server_round)
            if aggregated is not None or retries is None:
                break
            self._give_up_attempt(server_round, reports, left)
            before += reports
        refined = method.refine(self.adapted, self.data, server_round)
        if refined is not None:
            self._take(encode(refined, self.dtype), server_round)
        began = time.perf_counter()
        due = server_round % self.config.server.evaluate_every == 0 or server_round == self.config.run.rounds
        metrics = self._evaluate(server_round) if due else {}
        seconds = round_seconds([*before, *reports], time.perf_counter() - began)
        self.count(seconds, privacy_rows(server_round, reports))
        line = round_line(server_round, reports, mean, metrics, seconds, aggregated is not None, self.config)
        if retries is not None:
            line["retries"] = self.failed_attempts
        if self.config.server.over_sampling > 1:
            line["surplus"] = reports[-1].surplus
        line["epsilon"] = max((epsilon for epsilon, _ in self.totals.epsilon.values()), default=None)
        line["communication"] = dict(self.meter.totals)
        self.totals.seconds["total"] += time.perf_counter() - self.clock
        self.clock = time.perf_counter()
        self.done, self.failed_attempts = server_round, []
        outcome = Outcome(server_round, line, self.meter.take_rows(), reports)
        for callback in self.callbacks:
            callback.on_round(self, outcome)

    def _attempt(self, server_round: int) -> tuple[list[RoundReport], ArrayRecord | None, MetricRecord | None]:
        """Train and aggregate; return the reports of the exchanges, and the last one's arrays and mean metrics.

        The arrays are None where the round does not count; then nothing of it is left but what was spent.
        """
        self.roster.refresh()
        self._present()
        repeated = self.config.server.max_round_retries is not None
        for half in self.halves:
            half.attempt = len(self.failed_attempts)
        reports: list[RoundReport] = []
        exchanges = len(self.method.exchanges(self.config, server_round))
        for half in self.halves:
            half.noise.check(exchanges)
        undo = self._undo(server_round) if exchanges > 1 or repeated else None
        for exchange in range(1, exchanges + 1):
            aggregated, mean = self._exchange(server_round, exchange)
            reports.append(self.rounds.report)
            if aggregated is None:
                why = self.rounds.report.uncounted or "its strategy gave no arrays"
                log.warning("round %d does not count: %s", server_round, why)
                if undo is not None:
                    undo()
                break
            self._take(aggregated, server_round)
        return reports, aggregated, mean

    def _give_up_attempt(self, server_round: int, reports: Sequence[RoundReport], left: int) -> None:
        """Write what an attempt at a round spent and sent, so that a resumed run goes on from there.

        Raises
        ------
        RunError
            If no attempt is left.
        """
        self.count({}, privacy_rows(server_round, reports))
        why = reports[-1].uncounted or "its strategy gave no arrays"
        self.failed_attempts.append({"why": why, "failed": [failure for each in reports for failure in each.failed]})
        self.save(server_round - 1)
        self.folder.add_attempt(*attempt_rows(server_round, self.meter.take_rows(), reports))
        if not left:
            times = f"{len(self.failed_attempts)} times" if len(self.failed_attempts) > 1 else "once"
            raise RunError(f"round {server_round} failed {times}, the last time since {why}; continue with --resume")
        log.warning("round %d is repeated; %d more attempts are left", server_round, left)

    def count(self, seconds: Mapping[str, float], spent: Iterable[Mapping[str, Any]]) -> None:
        """Add to the totals what a round, or an exchange before the first, took and spent."""
        for name, value in seconds.items():
            self.totals.seconds[name] += value
        for row in spent:
            self.totals.epsilon[str(row["client"])] = [float(row["epsilon"]), float(row["delta"])]

    def _undo(self, server_round: int) -> Callable[[], None]:
        """Return a function that takes back a round's exchanges: their arrays, and the server's states."""
        arrays, whole = self.arrays, dict(self.parts.whole)
        chains = {part: chain.copy() for part, chain in self.parts.chains.items()}
        # What was released stays released.
        owners = {key: owner for key, owner in self.stateful.items() if key != "noise"}
        states = {key: deepcopy(owner.state_dict()) for key, owner in owners.items()}

        def undo() -> None:
            self.arrays, self.parts.whole, self.parts.chains = arrays, whole, chains
            self.show()
            self.method.replied.pop(server_round, None)
            for key, owner in owners.items():
                owner.load_state_dict(states[key])

        return undo

    @phase("exchange")
    def _exchange(self, server_round: int, exchange: int) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Send the messages of one exchange and aggregate the replies; return the next arrays and the mean metrics."""
        for half in self.halves:
            half.enter(server_round, exchange)
        roles = self._roles(server_round)
        stale = [kind for kind in sorted(self.method.changing()) if kind in roles and roles[kind].down == "stale"]
        self.wire.wanted = (INITIAL, *stale, *self.parts.chains)
        self.method.secure.send = partial(self.query, server_round, exchange)
        began = time.perf_counter()
        messages = self.rounds.configure_train(server_round, self.arrays, ConfigRecord(), self.wire)
        timeout = self.config.server.round_seconds
        messages = in_round(messages, server_round, self.roster, exchange, timeout, self.method.attempt)
        if self.method.codecs.feedback:
            messages = self._counted(messages)
        replies = self.wire.send_and_receive(messages, timeout=timeout)
        found: tuple[ArrayRecord | None, MetricRecord | None] = None, None
        lost: RoundError | None = None
        try:
            with self.asking("training clients", len(self.method.sample(server_round))) as counted:
                found = self.rounds.aggregate_train(server_round, told(counted(replies), self.roster))
        except RoundError as error:
            lost, self.rounds.report.uncounted = error, str(error)
        self.rounds.report.seconds = time.perf_counter() - began
        self.roster.after_round(self.rounds.report)
        if self.simulated:
            charge_unused(self, server_round)
        if lost is not None and self.config.server.max_round_retries is None:
            raise lost
        return found

    @contextmanager
    def asking(self, shown: str, clients: int) -> Iterator[Callable[[Iterable[Message]], Iterator[Message]]]:
        """Announce that clients answer; yield what counts the replies that it passes on."""
        with phase("clients", shown, clients, detail=getattr(self.grid, "doing", None)) as here:

            def counted(replies: Iterable[Message]) -> Iterator[Message]:
                for reply in replies:
                    here.advance()
                    yield reply

            yield counted

    def query(self, server_round: int, exchange: int, messages: list[Message]) -> Iterator[Message]:
        """Ask clients something within a round beside its own message; they get no arrays for it."""
        queries = in_round(messages, server_round, self.roster, exchange, attempt=self.method.attempt)
        yield from told(self.meter.send_and_receive(queries, timeout=self.config.server.timeout), self.roster)

    def _counted(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Tell each client the last round that its reply entered: only then is what its codec left out of it due."""
        clients, replied = self.roster.clients(), self.method.replied
        last = {client: server_round for server_round in sorted(replied) for client in replied[server_round]}
        told: dict[tuple[int, int], tuple[RecordDict, RecordDict]] = {}
        for message in messages:
            before, counted = message.content, last.get(clients.get(message.metadata.dst_node_id, -1), 0)
            key = id(before), counted  # contents that messages share stay shared
            if key not in told:
                settings = ConfigRecord({**before.config_records["config"], COUNTED: counted})
                told[key] = before, RecordDict({**before, "config": settings})
            message.content = told[key][1]
            yield message

    def _roles(self, server_round: int) -> Roles:
        """Return the roles of the exchange under way."""
        return self.method.exchanges(self.config, server_round)[self.method.exchange - 1].roles

    def _evaluate(self, server_round: int) -> dict[str, Any]:
        """Return the metrics of what a round made, on the server and by clients; of personalised models by clients."""
        if not self.method.personalised(self.config):
            metrics = self.method.evaluate(self.adapted, self.data, server_round)
            self.best.see(server_round, metrics)
            last = server_round == self.config.run.rounds or self.best.stops
            answers = self._score_answers() if last else {}
            return metrics | answers | self._ask(server_round)
        asked = self._ask(server_round)
        scores = self.method.evaluation.scores()
        return scores | asked if scores else {}

    def _score_answers(self) -> dict[str, float]:
        """Return the scores of the model's answers that ``[evaluation]`` asks for."""
        questions = self.data.questions
        return {} if questions is None else score_answers(self.adapted, questions, self.config)

    def _ask(self, server_round: int) -> dict[str, Any]:
        """Have clients evaluate on test examples of their own, if so configured; return ``clients``, the metrics."""
        if not self.config.server.fraction_evaluate:
            return {}
        method = self.method
        method.enter(server_round + 1, 1)  # what is sent is what the next round would start from
        method.evaluation.expect(self.adapted, self.data.test)
        self.wire.wanted = (INITIAL, *stale_kinds(method, server_round), *self.parts.chains)
        messages = method.configure_evaluate(server_round, self.arrays, ConfigRecord(), self.wire)
        timeout = self.config.server.timeout
        replies = self.wire.send_and_receive(in_round(messages, server_round, self.roster), timeout=timeout)
        with self.asking("clients evaluate", len(method.evaluation.asked)) as counted:
            method.aggregate_evaluate(server_round, told(counted(replies), self.roster))
        if method.evaluation.rows:
            self.folder.write_clients(method.evaluation.rows)
        return {"clients": method.evaluation.metrics(self.config)}

    def _present(self) -> None:
        """Pass on the clients that may be asked in this round."""
        present, clients = self.roster.present(), self.roster.clients()
        self.meter.clients = self.wire.clients = clients
        for half in self.halves:
            half.nodes, half.waits = present, self.roster.real

    def _take(self, record: ArrayRecord, server_round: int) -> None:
        """Make a round's aggregate the global arrays; what is an increment is added to the residual."""
        roles = self._roles(server_round)
        added = (
            {n for n in record if n.rpartition(".")[2].partition("_")[0] == RESIDUAL} if RESIDUAL in roles else set()
        )
        if added:
            self.parts.add(RESIDUAL, decode(ArrayRecord({name: record[name] for name in sorted(added)})), server_round)
            record = ArrayRecord({name: array for name, array in record.items() if name not in added})
        self.arrays = record
        self.show()
        self._keep_stale(server_round)

    @property
    def residual(self) -> Arrays:
        """The sum of all increments, by module path."""
        return self.parts.chains[RESIDUAL].total if RESIDUAL in self.parts.chains else {}

    def show(self) -> None:
        """Put the global arrays and the sum of all increments into the model."""
        self.adapted.set_shared(decode(self.arrays))
        self.adapted.set_residual(self.residual)

    def _keep_stale(self, made: int) -> None:
        """Set the current version of the arrays that change, and are sent to clients that lack them."""
        config = self.config
        # Two rounds show what alternates.
        rounds = range(made + 1, min(made + 2, config.run.rounds) + 1)
        tables = [exchange.roles for r in rounds for exchange in self.method.exchanges(config, r)]
        if made > self.done:  # this round may have more exchanges
            tables += [exchange.roles for exchange in self.method.exchanges(config, made)[self.method.exchange :]]
        kinds = {k for roles in tables for k, role in roles.items() if role.down == "stale" and not role.increment}
        last = (self.checkpoint.get("parts") or {}).get("made", {}) if made == self.done else {}
        for kind in sorted(kinds & self.method.changing()):
            arrays = decode(ArrayRecord({n: a for n, a in self.arrays.items() if self.method.kind(n) == kind}))
            self.parts.set(kind, arrays, int(last.get(kind, made)))

    def save(self, server_round: int) -> None:
        """Put into the checkpoint what a resumed run starts from."""
        saved = self.checkpoint
        saved["round"] = server_round
        saved["seconds"] = dict(self.totals.seconds)
        saved["epsilon"] = self.totals.epsilon
        if self.config.server.max_round_retries is not None:
            saved["failed_attempts"] = self.failed_attempts
        saved["communication"] = self.meter.totals
        saved["parts"] = self.parts.state_dict()
        saved["replied"] = {str(r): clients for r, clients in self.method.replied.items()}
        saved["names"] = self.roster.names
        for key, owner in self.stateful.items():
            saved[key], tensors = _divided(owner.state_dict())
            saved.set_arrays(key, tensors)  # none too, in place of those of an earlier round
        if RESIDUAL in self.parts.chains:
            arrays, saved["chain"] = self.parts.chains[RESIDUAL].to_arrays()
            saved.set_arrays("chain", arrays)
        saved.set_arrays("trained", decode(self.arrays))

    def finish(self) -> RunResult:
        """Export the result and write the summary."""
        config, folder = self.config, self.folder
        personalised = self.method.personalised(config)
        with phase("result", "writing the result"):
            self.best.export(self)
            self.method.export(self.adapted, self.data, folder.path)
            if personalised:
                export_own(self.adapted, config, folder.path, self.data.label_names, getattr(self.grid, "states", {}))
            for callback in self.callbacks:
                callback.on_end(self)
        spread = folder.rounds()[-1]["metrics"].get("clients", {}).get("fairness")
        if config.server.fraction_evaluate or personalised:
            pass  # clients did it themselves, or none was to
        elif config.server.evaluate_clients and self.simulated:
            began = time.perf_counter()
            size = config.server.batch_size
            clients = evaluate_clients(self.adapted, self.data.train, self.data.partition, size)
            folder.write_clients(clients)
            metric = get_task(config.model.task).client_metric
            spread = fairness(clients, metric, covered=not mechanism_of(config).is_private)
            self.totals.seconds["evaluate"] += time.perf_counter() - began
        elif config.server.evaluate_clients:
            log.info("note: server.evaluate_clients is not used: only a simulation holds the clients' examples")
        self.totals.seconds["total"] += time.perf_counter() - self.clock
        return folder.finish(summarise(self) | {"fairness": spread})


def _divided(state: dict[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """Divide a state into JSON values, and tensors named by the key of their dict, a line break and their own name."""
    plain: dict[str, Any] = {}
    tensors: Arrays = {}
    for key, value in state.items():
        if isinstance(value, dict) and value and all(isinstance(item, torch.Tensor) for item in value.values()):
            tensors |= {f"{key}\n{name}": item for name, item in value.items()}
        else:
            plain[key] = value
    return plain, tensors


def _joined(state: dict[str, Any], tensors: Arrays) -> dict[str, Any]:
    """Undo :func:`_divided`."""
    found = dict(state)
    for full, tensor in tensors.items():
        key, _, name = full.partition("\n")
        found.setdefault(key, {})[name] = tensor
    return found
