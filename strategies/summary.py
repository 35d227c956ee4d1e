"""What a run says of itself: lines of rounds.jsonl and privacy.csv, and summary.json."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import MetricRecord

from fedlora.communication.links import link_seed
from fedlora.config import Config
from fedlora.corrections import correction
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.tasks import Task, get_task
from fedlora.training.optimizer_state import state_size

if TYPE_CHECKING:
    from fedlora.strategies.base import RoundReport
    from fedlora.strategies.federation import Federation


def summarise(federation: Federation) -> dict[str, Any]:
    """Return the content of summary.json."""
    config, folder, method, totals = federation.config, federation.folder, federation.method, federation.totals
    lines = folder.rounds()
    seen = evaluated(lines)
    final = {k: v for k, v in seen[-1]["metrics"].items() if k != "validation"} if seen else {}
    epsilons = [epsilon for epsilon, _ in totals.epsilon.values()]
    epsilon = None
    if epsilons:
        epsilon = {
            "max": max(epsilons),
            "mean": sum(epsilons) / len(epsilons),
            "delta": config.privacy.target_delta,
            "accountant": config.privacy.accountant,
            "mode": config.privacy.mode,
            "unit": mechanism_of(config).protects(config),
            "covers_init": method.covers_init,
        }
    order = ("total", "load", "train", "communicate", "aggregate", "evaluate")
    return {
        "method": config.method.name,
        "seed": config.run.seed,
        "rounds": federation.done,
        "clients": len(federation.roster.nodes),
        "personalised": method.personalised(config),
        "start": folder.checkpoint.get("start"),
        "final": final,
        "test_examples": _tested(federation, final),
        "best": best_round(lines, get_task(config.model.task)),
        "trainable_parameters": method.trained_numbers(federation.adapted),
        "epsilon": epsilon,
        "communication": federation.meter.totals,
        "network": network_seconds(config, lines),
        "seconds": {name: totals.seconds[name] for name in order},
        "environment": environment(config),
        **method.facts(federation.adapted),
    }


def _tested(federation: Federation, final: Mapping[str, Any]) -> int | None:
    """Return of how many test examples the final score is: the server's, or of personalised models the clients' own."""
    if federation.method.personalised(federation.config):
        examples: int | None = final.get("clients", {}).get("examples")
        return examples
    return len(federation.data.test)


def memory_notes(config: Config, numbers: int, bases: int, itemsize: int) -> list[str]:
    """Say how many bytes clients and server keep between rounds beside what the method leaves with them.

    Parameters
    ----------
    config : Config
    numbers : int
        That a client trains.
    bases : int
        Numbers of the arrays that the coordinates of these are relative to, which are kept with each.
    itemsize : int
        Bytes of one.
    """
    notes = []
    size = state_size(config.client) if config.client.keep_optimizer_state else 0
    if size:
        size = (size * numbers + bases) * itemsize
        notes.append(f"each client keeps {size:,} bytes between rounds: its optimiser's moments")
    if correction(config).active:
        # Its own, and the one that it makes of it; a round of several exchanges may go back to a third.
        size = (2 * numbers + bases) * itemsize
        notes.append(f"each client keeps up to {size:,} bytes between rounds: variates of {config.client.correction}")
    if config.wire.keeps_errors:
        # Those of its last round, and of before, to which a round that does not count goes back.
        size = (2 * numbers + bases) * itemsize
        notes.append(f"each client keeps up to {size:,} bytes between rounds: what the uplink's codec left out")
    if (bands := config.privacy.groups) > 1:
        size = (bands - 1) * numbers * 8  # in float64
        notes.append(f"the server keeps up to {size:,} bytes between rounds: noise of the {bands - 1} rounds before")
    return notes


def evaluated(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rounds after which the model was evaluated."""
    return [line for line in lines if line["metrics"]]


def network_seconds(config: Config, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Add up what the rounds' messages take on the simulated links."""
    if config.network.profile == "none":
        return None
    of_rounds = [line["network"]["seconds"] for line in lines]
    return {"profile": config.network.profile, "seed": link_seed(config), "seconds": sum(of_rounds)}


def fairness(clients: list[dict[str, Any]], name: str, covered: bool) -> dict[str, Any]:
    """Describe how a metric of the final model spreads over clients; each client counts once."""
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
        # Of torch the build too, such as 2.13.0+cpu: a package's own version may leave it out.
        "versions": {name: _version(name) for name in packages} | {"torch": torch.__version__},
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


@cache
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
    return _described(root) if (root / ".git").exists() else os.environ.get("FEDLORA_COMMIT") or None


@cache  # what a process has imported does not change with the files
def _described(root: Path) -> str | None:
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def best_round(lines: list[dict[str, Any]], task: Task) -> dict[str, Any] | None:
    """The round that validation prefers; without validation there is none, since choosing on test would flatter."""
    lines = [line for line in evaluated(lines) if "validation" in line["metrics"]]
    if not lines:
        return None
    line = max(lines, key=lambda line: task.score(line["metrics"]["validation"]))
    return {"round": line["round"], **line["metrics"]["validation"]}


def round_seconds(reports: Sequence[RoundReport], evaluation: float) -> dict[str, float]:
    """Split a round's wall time: training is the busiest worker's, communication what is left of an exchange."""
    seconds = {"train": 0.0, "communicate": 0.0, "aggregate": 0.0, "evaluate": evaluation}
    for report in reports:
        workers: dict[Any, float] = defaultdict(float)
        for row in report.metrics.values():
            workers[row.get("worker")] += float(row.get("seconds", 0.0))  # type: ignore[arg-type]
        train = min(report.seconds, max(workers.values(), default=0.0))
        aggregate = min(report.seconds - train, report.aggregate_seconds)
        seconds["train"] += train
        seconds["aggregate"] += aggregate
        seconds["communicate"] += report.seconds - train - aggregate
    return seconds


def round_line(
    server_round: int,
    reports: Sequence[RoundReport],
    mean: MetricRecord | None,
    metrics: dict[str, Any],
    seconds: dict[str, float],
    counted: bool,
    config: Config,
) -> dict[str, Any]:
    private, report = mechanism_of(config).is_private, reports[-1]
    return {
        "round": server_round,
        "metrics": metrics,
        "train_loss": mean.get("loss") if mean is not None else None,
        # Under DP the training loss is for the simulation's eyes: no noise covers it.
        "train_loss_covered": not private,
        "clients": report.clients,
        "failed": [failure for each in reports for failure in each.failed],
        "counted": counted,
        "uncounted": report.uncounted or None,
        "drift": report.drift,
        "seconds": seconds,
    }


def privacy_rows(server_round: int, reports: Sequence[RoundReport]) -> list[dict[str, Any]]:
    """Return a round's lines of privacy.csv: of each client that adds noise, or one of all where the server does.

    Clients whose replies were not used have lines too, where it is known what they spent.
    """
    released = [{"round": server_round, "client": "all", **each.release} for each in reports if each.release]
    rows = []
    for report in reports:
        spent = report.unused | {
            client: {
                "steps": row["steps"],
                "sample_rate": row["sample-rate"],
                "noise_multiplier": row["noise-multiplier"],
                "epsilon": row["epsilon"],
                "delta": row["delta"],
            }
            for client, row in report.metrics.items()
            if "epsilon" in row
        }
        rows += [{"round": server_round, "client": client, **spent[client]} for client in sorted(spent)]
    return released + rows
