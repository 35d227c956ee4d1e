"""Run folders as runs write them, with drawn numbers: a comparison without training anything."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config import load_config
from fedlora.results.folder import COMMUNICATION, PARTITION, PRIVACY

CLIENT_COUNT, ROUNDS, TEST_EXAMPLES = 4, 3, 1281
LABELS = ("fresh", "rotten")


def make_run(
    path: Path,
    number: int,
    overrides: dict[str, Any],
    *,
    task: str = "sequence-classification",
    on_nodes: bool = False,
) -> Path:
    """Write a finished run's folder; its numbers are drawn from ``number``."""
    rng = np.random.default_rng(number)
    text = task != "sequence-classification"
    config = load_config(
        {
            "run": {"name": path.name, "rounds": ROUNDS},
            "model": {"name": "asset:minilm-l6", "task": task},
            "data": {"name": "asset:rotten-tomatoes", "partition": {"clients": CLIENT_COUNT}},
            "method": {"name": "fed-sb"},
        },
        overrides,
    )
    private = config.privacy.mode != "none"
    path.mkdir(parents=True)
    (path / "config.toml").write_text(config.to_toml())
    rows, lines, sent = [], [], dict.fromkeys(("initial", "down", "up"), 0)
    payload = 0
    for server_round in range(1, ROUNDS + 1):
        for client in range(CLIENT_COUNT):
            for way in ("initial", "down", "up") if server_round == 1 else ("down", "up"):
                size = int(rng.integers(1000, 9000)) * (10 if way == "initial" else 1)
                row = (server_round, client, way, size, size + int(rng.integers(90, 99)), size)
                rows.append(row)
                payload += size
                sent[way] += row[4]
        values = {"loss": float(rng.uniform(0.3, 1))} | metrics(rng, text)
        lines.append(
            {
                "round": server_round,
                "metrics": values if server_round != 1 else {},
                "train_loss": 0.5,
                "drift": None if server_round == 2 else float(rng.uniform(0.5, 4)),
                "seconds": {"train": 1.0 + number % 3, "communicate": 0.5, "aggregate": 0.25, "evaluate": 9.0},
                "clients": list(range(CLIENT_COUNT)),
                "failed": [],
            }
        )
    epsilon = (config.privacy.target_epsilon or 5.0) - float(rng.uniform(0, 0.01))
    summary = {
        "method": config.method.name,
        "seed": config.run.seed,
        "rounds": ROUNDS,
        "clients": CLIENT_COUNT,
        "final": lines[-1]["metrics"],
        "test_examples": TEST_EXAMPLES,
        "trainable_parameters": 100 * config.method.rank,
        "epsilon": {"max": epsilon, "mean": epsilon / 2, "delta": 1e-5, "accountant": "rdp", "covers_init": True}
        if private
        else None,
        "communication": {
            "initial_bytes": sent["initial"],
            "downlink_bytes": sent["down"],
            "uplink_bytes": sent["up"],
            "payload_bytes": payload,
            "formula_bytes": payload,
        },
        "seconds": {"total": float(rng.uniform(1, 9))},
        "environment": {"platform": "Linux", "command": f"fedlora run {path.name}", "commit": "c0ffee"},
    }
    if on_nodes:
        moved = {"sent_bytes": 2 * sent["down"], "received_bytes": sent["up"], "message_bytes": sum(sent.values())}
        overhead = (moved["sent_bytes"] + moved["received_bytes"]) / moved["message_bytes"] - 1
        summary["communication"]["flower"] = {**moved, "overhead": overhead}
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_csv(path / "communication.csv", COMMUNICATION, rows)
    charged = [
        (server_round, client, 5, 0.1, 1.0, epsilon * (server_round / ROUNDS) ** 0.5 * (1 - 0.1 * client), 1e-5)
        for server_round in range(1, ROUNDS + 1)
        for client in range(CLIENT_COUNT)
    ]
    write_csv(path / "privacy.csv", PRIVACY, charged if private else [])
    scores = [
        (c, int(rng.integers(5, 50)), float(rng.uniform(0.2, 1)), *([] if text else [float(rng.uniform(0.2, 1))]))
        for c in range(CLIENT_COUNT)
    ]
    write_csv(path / "clients.csv", ("client", "examples", "loss", *([] if text else ["accuracy"])), scores)
    write_csv(
        path / "partition.csv",
        PARTITION,
        [(c, f"owner {c}", label, int(rng.integers(0, 40))) for c in range(CLIENT_COUNT) for label in LABELS],
    )
    return path


def metrics(rng: np.random.Generator, text: bool) -> dict[str, float]:
    """Draw what an evaluation gives beside the loss."""
    if text:
        return {"perplexity": float(rng.uniform(10, 90))}
    return {
        "accuracy": float(rng.uniform(0.55, 0.9)),
        "macro_f1": float(rng.uniform(0.4, 0.8)),
        "majority": 0.574,
    }


def write_csv(path: Path, columns: tuple[str, ...], rows: list[Any]) -> None:
    """Write a table with its header."""
    with path.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([columns, *rows])


def make_study(folder: Path, seeds: int = 3) -> Path:
    """Write a comparison: three methods, one of them with two ranks, three levels of privacy, some seeds."""
    number = 0
    for method, rank in (("fed-sb", 8), ("fed-sb", 16), ("ffa-lora", 8), ("fedit", 8)):
        for epsilon in (1.0, 8.0, None):
            for seed in range(seeds):
                number += 1
                privacy: dict[str, Any] = {"privacy.mode": "none"}
                if epsilon is not None:
                    privacy = {"privacy.mode": "example", "privacy.target_epsilon": epsilon}
                rate = {"fed-sb": 0.06, "ffa-lora": 0.04, "fedit": 0.02}[method]
                overrides = {"method.name": method, "method.rank": rank, "run.seed": seed, **privacy}
                if method == "fedit":
                    overrides |= {"network.profile": "lte", "network.upload_mbps": 2.5}
                overrides["client.learning_rate"] = rate / (2 if epsilon else 1)
                on_nodes = method == "ffa-lora" and epsilon == 8.0
                make_run(folder / f"{method}-r{rank}-e{epsilon}-s{seed}", number, overrides, on_nodes=on_nodes)
    return folder
