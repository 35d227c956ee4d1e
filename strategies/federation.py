"""One federation from start to end, on whatever Grid there is."""

from __future__ import annotations

import logging
import math
import os
import platform
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.adapters import AdaptedModel
from fedlora.communication.broadcast import InitialBroadcast
from fedlora.communication.links import link_seed, network_profile, round_network
from fedlora.communication.meter import MeteredGrid, row_dict
from fedlora.communication.wire import decode, digest, encode, wire_dtype
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.errors import InputError, RunError
from fedlora.node.names import NODE_RECORD
from fedlora.results.folder import RunFolder, RunResult
from fedlora.results.identity import check_model, note_environment
from fedlora.results.plot import plot_rounds
from fedlora.results.tracking import open_trackers
from fedlora.strategies.base import FederatedStrategy, RoundReport
from fedlora.strategies.nodes import AddressedGrid, Roster
from fedlora.strategies.replies import ReplyError, is_finite, read_metrics
from fedlora.training import evaluate_clients
from fedlora.training.soundness import check_sound

log = logging.getLogger("fedlora")


@dataclass
class Progress:
    """What a progress display may show; every hook does nothing by default.

    Attributes
    ----------
    on_start : callable (rounds, first round, clients a round)
    on_client : callable (client)
    on_round : callable (line of rounds.jsonl)
    on_note : callable (text)
        What a server tells, such as which nodes do not take part.
    """

    on_start: Callable[[int, int, int], None] = lambda rounds, first, clients: None
    on_client: Callable[[int], None] = lambda client: None
    on_round: Callable[[dict[str, Any]], None] = lambda line: None
    on_note: Callable[[str], None] = lambda text: None


@dataclass
class Totals:
    """What adds up over rounds and restarts."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    epsilon: dict[str, list[float]] = field(default_factory=dict)  # client -> [epsilon, delta]


def run_federation(
    config: Config,
    grid: Grid,
    folder: RunFolder,
    data: FederatedData,
    strategy: FederatedStrategy,
    *,
    training: Strategy | None = None,
    progress: Progress | None = None,
    started: float | None = None,
    simulated: bool = False,
) -> RunResult:
    """Run, or go on with, a federation.

    Parameters
    ----------
    config : Config
        Resolved.
    grid : Grid
        RayGrid in simulation, Flower's own in deployment.
    folder : RunFolder
        New, or opened to resume.
    data : FederatedData
        For evaluation on the server, and for starts that read public or pooled data.
    strategy : FederatedStrategy
        Of the config's method: says what is trained, how it starts and what its formula is.
    training : Strategy, optional
        Configures and aggregates the rounds instead of ``strategy``; any Flower Strategy.
    progress : Progress, optional
    started : float, optional
        ``time.perf_counter()`` when the run began, if that was before this call.
    simulated : bool
        Whether ``data`` holds the examples that the clients train on.

    Returns
    -------
    RunResult

    Raises
    ------
    InputError
        If a private run is resumed whose clients' ledgers are gone, any run whose base model is another now, or the
        model's examples depend on each other.
    """
    clock = started or time.perf_counter()
    progress, rounds = progress or Progress(), training or strategy
    checkpoint = folder.checkpoint

    # 1. Who is there.
    federation = str(checkpoint.get("federation") or uuid.uuid4().hex)
    roster = Roster(grid, config, data.label_names, federation, checkpoint.get("names", []), strategy.refuses)
    roster.discover()
    nodes = roster.nodes
    if not roster.real and len(nodes) < len(data.partition):
        remedy = f"{len(nodes)} nodes are there, and every client needs one; give flwr run --federation-config"
        raise InputError(
            "data.partition.clients", len(data.partition), f"{remedy} num-supernodes={len(data.partition)}"
        )
    if folder.resumed and config.privacy.mode == "example" and not (simulated or roster.real):
        # Flower's runtimes keep a client's state for one of their runs: epsilon would begin at 0 again.
        remedy = "the clients' ledgers ended with Flower's run; run anew with another output, or with fedlora run"
        raise InputError("resume", True, remedy)
    if roster.real:
        # Kept at once: what nodes spend in a round that is lost belongs to this run all the same.
        checkpoint["federation"], checkpoint["names"] = federation, roster.names
        checkpoint.commit()
    strategy.nodes, strategy.names = nodes, roster.names
    strategy.on_reply = progress.on_client
    if isinstance(rounds, FederatedStrategy):
        rounds.nodes, rounds.names, rounds.on_reply = nodes, roster.names, progress.on_client
        rounds.examples = roster.examples

    if config.privacy.mode == "example" and config.privacy.accountant == "gdp":
        # A central limit theorem of many steps: Opacus warns of it too.
        log.warning("privacy.accountant = gdp can give several times too small an epsilon; rdp and prv are bounds")

    # 2. The model on the server, and where the arrays start: fresh, or from the checkpoint.
    adapted = strategy.server_model(data)
    check_model(folder, config, adapted)
    note_environment(folder, environment(config))
    for note in (*data.notes, *adapted.notes):
        folder.tell(note)
    for note in folder.notes:
        progress.on_note(note)
    if config.privacy.mode == "example" and adapted.stacked_layers():
        # Clients measure it too; here the run ends before anybody is asked.
        check_sound(adapted, config, data.train.pad_token_id)
    done = int(checkpoint.get("round", 0))
    totals = Totals()
    if done:
        frozen, trained = checkpoint.get_arrays("frozen") or {}, checkpoint.get_arrays("trained") or {}
        totals.seconds.update(checkpoint.get("seconds"))
        totals.epsilon.update(checkpoint.get("epsilon"))
        if isinstance(rounds, FederatedStrategy):
            rounds.load_state_dict(checkpoint.get("strategy", {}))
    else:
        start = strategy.start_arrays(adapted, data) | adapted.arrays(adapted.head_names)
        names = set(adapted.names(strategy.trained))
        frozen = {name: array for name, array in start.items() if name not in names}
        trained = {name: array for name, array in start.items() if name in names}
        checkpoint.set_arrays("frozen", frozen)
    # In the model's order, which is that of the clients' replies; a file has another.
    trained = {name: trained[name] for name in adapted.names(strategy.trained) if name in trained} | trained
    adapted.set_shared(frozen | trained)

    # 3. The wire: every message is metered, frozen arrays go along with a client's first.
    dtype = wire_dtype(config.model.dtype)
    meter = MeteredGrid(AddressedGrid(grid), strategy.client_formula(adapted), roster.clients())
    wire = InitialBroadcast(meter, encode(frozen, dtype))
    wire.contacted = {nodes[client] for client in checkpoint.get("contacted", []) if client in nodes}
    meter.totals.update(checkpoint.get("communication", {}))
    settings = ConfigRecord(
        {"parameterisation": strategy.parameterisation, "initial-digest": digest(decode(wire.arrays))}
    )
    if not frozen:
        settings["initial-digest"] = ""
    arrays = encode(trained, dtype)
    totals.seconds["load"] += time.perf_counter() - clock
    if not done:
        began = time.perf_counter()
        checkpoint["start"] = strategy.evaluate(adapted, data, 0)
        totals.seconds["evaluate"] += time.perf_counter() - began

    # 4. Rounds.
    trackers = open_trackers(config, folder.path)
    network, seed = network_profile(config.network), link_seed(config)
    rounds.summary()
    progress.on_start(config.run.rounds, done, len(strategy.sample(done + 1)))
    for server_round in range(done + 1, config.run.rounds + 1):
        roster.refresh()
        strategy.nodes, meter.clients = roster.present(), roster.clients()
        if isinstance(rounds, FederatedStrategy):
            rounds.nodes, rounds.waits = roster.present(), roster.real
        began = time.perf_counter()
        # For a strategy that knows no schedule; fedlora's own set it themselves.
        settings["learning-rate"] = strategy.learning_rate(server_round)
        messages = rounds.configure_train(server_round, arrays, settings, wire)
        replies = _Recorded(
            wire.send_and_receive(_in_round(messages, server_round, roster), timeout=config.server.timeout), roster
        )
        aggregated, mean = rounds.aggregate_train(server_round, replies)
        exchange = time.perf_counter() - began
        report = rounds.report if isinstance(rounds, FederatedStrategy) else replies.report
        roster.after_round(report)
        # fedlora's own strategies say themselves when a round of failures ends the run, and what is no mean.
        if not isinstance(rounds, FederatedStrategy):
            if report.clients and len(report.failed) == len(report.clients):
                said = str(report.failed[0]["error"]).strip().rpartition("\n")[2]
                raise RunError(f"every client of round {server_round} failed: {said}")
            if aggregated is not None and not is_finite(decode(aggregated).values()):
                aggregated, report.uncounted = None, "the aggregate is not finite"
        if aggregated is not None:
            arrays = aggregated
        else:
            log.warning("round %d does not count: %s", server_round, report.uncounted or "its strategy gave no arrays")
        adapted.set_shared(decode(arrays))
        refined = strategy.refine(adapted, data, server_round)
        if refined is not None:
            arrays = encode(refined, dtype)
            adapted.set_shared(refined)
        began = time.perf_counter()
        due = server_round % config.server.evaluate_every == 0 or server_round == config.run.rounds
        metrics = strategy.evaluate(adapted, data, server_round) if due else {}
        seconds = _seconds(report, exchange, time.perf_counter() - began)
        for name, value in seconds.items():
            totals.seconds[name] += value
        line = _line(server_round, report, mean, metrics, seconds, aggregated is not None, config)
        for client, row in report.metrics.items():
            if "epsilon" in row:
                totals.epsilon[str(client)] = [float(row["epsilon"]), float(row["delta"])]  # type: ignore[arg-type]
        line["epsilon"] = max((e for e, _ in totals.epsilon.values()), default=None)
        line["communication"] = dict(meter.totals)
        # 5. The checkpoint: the round is there whole, or not at all.
        totals.seconds["total"] += time.perf_counter() - clock
        clock = time.perf_counter()
        checkpoint["round"] = server_round
        checkpoint["seconds"] = dict(totals.seconds)
        checkpoint["epsilon"] = totals.epsilon
        checkpoint["contacted"] = [client for client, node in nodes.items() if node in wire.contacted]
        checkpoint["communication"] = meter.totals
        if roster.real:
            checkpoint["names"] = roster.names
        checkpoint["strategy"] = rounds.state_dict() if isinstance(rounds, FederatedStrategy) else {}
        checkpoint.set_arrays("trained", decode(arrays))
        rows = meter.take_rows()
        line["network"] = round_network(rows, network, seed) if network is not None else None
        folder.add_round(line, map(row_dict, rows), _privacy_rows(server_round, report))
        for show in (*trackers, progress.on_round):
            show(line)

    # 6. The result.
    strategy.export(adapted, data, folder.path)
    plot_rounds(folder.path / "rounds.png", folder.rounds(), f"{config.run.name}: {strategy.title}")
    fairness = None
    if config.server.evaluate_clients and simulated:
        began = time.perf_counter()
        clients = evaluate_clients(adapted, data.train, data.partition, config.server.batch_size)
        folder.write_clients(clients)
        fairness = _fairness(clients, covered=config.privacy.mode == "none")
        totals.seconds["evaluate"] += time.perf_counter() - began
    elif config.server.evaluate_clients:
        log.info("note: server.evaluate_clients is not used: only a simulation holds the clients' examples")
    totals.seconds["total"] += time.perf_counter() - clock
    return folder.finish(
        summarise(config, folder, strategy, adapted, nodes, meter.totals, totals) | {"fairness": fairness}
    )


def summarise(
    config: Config,
    folder: RunFolder,
    strategy: FederatedStrategy,
    adapted: AdaptedModel,
    nodes: dict[int, int],
    communication: dict[str, int],
    totals: Totals,
) -> dict[str, Any]:
    """Return the content of summary.json."""
    lines = folder.rounds()
    evaluated = [line for line in lines if line["metrics"]]
    final = {k: v for k, v in evaluated[-1]["metrics"].items() if k != "validation"} if evaluated else {}
    epsilons = [epsilon for epsilon, _ in totals.epsilon.values()]
    epsilon = None
    if epsilons:
        epsilon = {
            "max": max(epsilons),
            "mean": sum(epsilons) / len(epsilons),
            "delta": config.privacy.target_delta,
            "accountant": config.privacy.accountant,
            "mode": config.privacy.mode,
            "unit": "one example of one client",
            "covers_init": strategy.covers_init,
        }
    names = adapted.names(strategy.trained)
    order = ("total", "load", "train", "communicate", "aggregate", "evaluate")
    return {
        "method": config.method.name,
        "seed": config.run.seed,
        "rounds": config.run.rounds,
        "clients": len(nodes),
        "start": folder.checkpoint.get("start"),
        "final": final,
        "best": _best(evaluated),
        "trainable_parameters": sum(adapted.parameter(name)[0].numel() for name in names),
        "epsilon": epsilon,
        "communication": communication,
        "network": _network(config, lines),
        "seconds": {name: totals.seconds[name] for name in order},
        "environment": environment(config),
        **strategy.facts(adapted),
    }


def _network(config: Config, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Add up what the rounds' messages take on the simulated links."""
    if config.network.profile == "none":
        return None
    of_rounds = [line["network"]["seconds"] for line in lines]
    return {"profile": config.network.profile, "seed": link_seed(config), "seconds": sum(of_rounds)}


def _fairness(clients: list[dict[str, Any]], covered: bool) -> dict[str, Any]:
    """Describe how the final model's accuracy (loss, for language models) spreads; each client counts once."""
    name = "accuracy" if "accuracy" in clients[0] else "loss"
    values = np.array([row[name] for row in clients])
    return {
        "metric": name,
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
        # It is computed from the clients' examples without noise.
        "covered": covered,
    }


def environment(config: Config) -> dict[str, Any]:
    """Return the versions and the machine that a result depends on."""
    packages = ("fedlora", "torch", "flwr", "opacus", "transformers", "ray", "peft", "numpy")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and config.simulation.gpus_per_worker else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "gpu": gpu,
        "versions": {name: _version(name) for name in packages},
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return None


def _commit() -> str | None:
    """Return the commit of the source tree that runs, with ``-dirty`` if files differ from it.

    Outside of a checkout, as in a container, it is what the environment variable FEDLORA_COMMIT says, if anything.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return os.environ.get("FEDLORA_COMMIT") or None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _best(evaluated: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The round that validation prefers; without validation there is none, since choosing on test would flatter."""
    lines = [line for line in evaluated if "validation" in line["metrics"]]
    if not lines:
        return None

    def score(line: dict[str, Any]) -> float:
        metrics = line["metrics"]["validation"]
        if "accuracy" in metrics:
            return float(metrics["accuracy"])
        return -math.inf if metrics["loss"] is None else -float(metrics["loss"])

    line = max(lines, key=score)
    return {"round": line["round"], **line["metrics"]["validation"]}


class _Recorded:
    """Replies on their way to a strategy of any kind, with what the run folder needs of them."""

    def __init__(self, replies: Iterable[Message], roster: Roster) -> None:
        self._replies, self._roster = replies, roster
        self._clients = roster.clients()
        self._private = roster.config.privacy.mode != "none"
        self.report = RoundReport()

    def __iter__(self) -> Any:
        for reply in self._replies:
            client = self._clients.get(reply.metadata.src_node_id, -1)
            self.report.clients.append(client)
            if reply.has_error():
                node, code, reason = reply.metadata.src_node_id, reply.error.code, reply.error.reason or ""
                reply.error.__dict__["_reason"] = self._roster.told(node, code, reason)
                error = {"client": client, "code": reply.error.code, "error": reply.error.reason}
                self.report.failed.append(error)
            else:
                # A user's own client may answer otherwise; what the strategy makes of that is its own affair.
                try:
                    metrics = read_metrics(reply.content.get("metrics"), private=self._private)  # type: ignore[arg-type]
                except ReplyError:
                    metrics = MetricRecord()
                self.report.metrics[client] = metrics
            yield reply


def _in_round(messages: Iterable[Message], server_round: int, roster: Roster) -> Iterable[Message]:
    """Mark messages with their round; they end with it. Real nodes are told which client they are of which run."""
    clients = roster.clients()
    for message in messages:
        message.metadata.group_id = str(server_round)
        message.metadata.ttl = roster.config.server.timeout
        if roster.real:
            client = clients.get(message.metadata.dst_node_id, -1)
            about = ConfigRecord({"federation": roster.federation, "client": client})
            # The content may be one object shared by all of a round's messages, so it is not changed in place.
            message.content = RecordDict({**message.content, NODE_RECORD: about})
        yield message


def _seconds(report: RoundReport, exchange: float, evaluation: float) -> dict[str, float]:
    """Split a round's wall time: training is the busiest worker's, communication what is left of the exchange."""
    workers: dict[Any, float] = defaultdict(float)
    for row in report.metrics.values():
        workers[row.get("worker")] += float(row.get("seconds", 0.0))  # type: ignore[arg-type]
    train = min(exchange, max(workers.values(), default=0.0))
    aggregate = min(exchange - train, report.aggregate_seconds)
    communicate = exchange - train - aggregate
    return {"train": train, "communicate": communicate, "aggregate": aggregate, "evaluate": evaluation}


def _line(
    server_round: int,
    report: RoundReport,
    mean: MetricRecord | None,
    metrics: dict[str, Any],
    seconds: dict[str, float],
    counted: bool,
    config: Config,
) -> dict[str, Any]:
    private = config.privacy.mode != "none"
    return {
        "round": server_round,
        "metrics": metrics,
        "train_loss": mean.get("loss") if mean is not None else None,
        # Under DP the training loss is for the simulation's eyes: no noise covers it.
        "train_loss_covered": not private,
        "clients": report.clients,
        "failed": report.failed,
        "counted": counted,
        "uncounted": report.uncounted or None,
        "drift": report.drift,
        "seconds": seconds,
    }


def _privacy_rows(server_round: int, report: RoundReport) -> list[dict[str, Any]]:
    return [
        {
            "round": server_round,
            "client": client,
            "steps": row["steps"],
            "sample_rate": row["sample-rate"],
            "noise_multiplier": row["noise-multiplier"],
            "epsilon": row["epsilon"],
            "delta": row["delta"],
        }
        for client, row in sorted(report.metrics.items())
        if "epsilon" in row
    ]
