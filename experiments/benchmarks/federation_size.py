"""Does memory, or the time of a round, grow with the federation? 1,000 clients against 10,000, of which 100 train.

Each size runs in a process of its own, with its own Ray. The peak is that of the driver and of all processes below it
together (proportional set size, so that shared pages count once), read five times a second; what the driver and the
workers have to themselves (unique set size) is read after every round::

    python -m fedlora.experiments.benchmarks.federation_size --output federation_size.json

More clients than there are reviews have made texts, two each, and a small model of random weights::

    python -m fedlora.experiments.benchmarks.federation_size --clients 100000 --train 1000 --rounds 40 \
        --set simulation.cohort_size=50 --output federation_100000.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fedlora.experiments.benchmarks.llm import make_model, make_texts
from fedlora.experiments.benchmarks.machine import machine

CONFIG: dict[str, Any] = {
    "run": {"name": "federation-size", "rounds": 8},
    "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 32, "num_hidden_layers": 1},
    "data": {"name": "asset:rotten-tomatoes", "max_examples": 10000, "max_test_examples": 200},
    "method": {"name": "fed-sb"},
    "client": {"batch_size": 1, "local_steps": 2},
    "privacy": {"mode": "example", "noise_multiplier": 1.0},
    "simulation": {"workers": 1, "cohort_size": 20},
}


REVIEWS = 10000
"""Of CONFIG: each of them is one client's at least."""

SHAPE: dict[str, Any] = {
    "architecture": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 500,
}


def measure(clients: int, train: int, given: list[str]) -> dict[str, Any]:
    """Run a federation of so many clients in this process; return seconds and bytes by round, and peak bytes."""
    from fedlora import simulate
    from fedlora.cli import parse_overrides
    from fedlora.strategies.callbacks import Progress

    with tempfile.TemporaryDirectory() as scratch, _PeakMemory() as memory:
        folder, kept = Path(scratch) / "run", []  # type: Path, list[dict[str, int]]
        made = _made(Path(scratch) / "made", 2 * clients) if clients > REVIEWS else {}
        size = {"data.partition.clients": clients, "server.fraction_train": train / clients}
        progress = Progress(on_round=lambda _: kept.append(_by_role()))
        simulate(CONFIG, made | parse_overrides(given) | size, output=folder, progress=progress)
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return {
        "clients": clients,
        "trained": [len(line["clients"]) for line in lines],
        "peak_bytes": memory.peak,
        "peak_bytes_by_process": memory.by_name,
        "bytes_after_rounds": kept,
        "seconds_a_round": [sum(line["seconds"].values()) for line in lines],
    }


def _made(folder: Path, rows: int) -> dict[str, Any]:
    """Make a model and so many texts; return the keys of the config that name them."""
    folder.mkdir()
    make_model(folder, SHAPE)
    for file, count in (("train", rows), ("test", 200)):
        make_texts(folder / f"{file}.jsonl", count, 8, SHAPE["vocab_size"], labels=2)
    places = {"model.name": folder, "data.name": folder / "train.jsonl", "data.test": folder / "test.jsonl"}
    whole = {"data.max_examples": None, "data.max_test_examples": None, "model.num_hidden_layers": None}
    return {key: str(place) for key, place in places.items()} | whole


def _by_role() -> dict[str, int]:
    """Return what this process has to itself, its Ray workers together, and Ray's own processes."""
    found = {"driver": psutil.Process().memory_full_info().uss, "workers": 0, "ray": 0}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            role = "workers" if process.name().startswith("ray::Worker") else "ray"
            found[role] += process.memory_full_info().uss
    return found


def _growth(kept: list[dict[str, int]], role: str) -> float:
    """Return by how many bytes a round memory grows over the second half of the rounds, by least squares."""
    half = [row[role] for row in kept[len(kept) // 2 :]]
    return float(np.polyfit(range(len(half)), half, 1)[0]) if len(half) > 1 else 0.0


class _PeakMemory:
    """Samples the memory of this process and of all below it."""

    def __init__(self) -> None:
        self.peak, self.by_name = 0, {}  # type: int, dict[str, int]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.2):
            total = 0
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                try:
                    size, name = process.memory_full_info().pss, process.name()
                except psutil.Error:  # it ended meanwhile
                    continue
                total += size
                self.by_name[name] = max(self.by_name.get(name, 0), size)
            self.peak = max(self.peak, total)


def main() -> None:
    """Measure both sizes, print a table and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--train", type=int, default=100, help="of them a round, on average")
    parser.add_argument("--rounds", type=int, default=CONFIG["run"]["rounds"])
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.train, arguments.set)))
        return
    results = []
    print(f"{'clients':>8} {'peak MB':>10} {'s a round':>10} {'driver MB, KB a round':>25} {'workers':>15}")
    for clients in arguments.clients:
        command = [sys.executable, "-m", "fedlora.experiments.benchmarks.federation_size", "--child", str(clients)]
        command += ["--train", str(arguments.train), "--set", *arguments.set, f"run.rounds={arguments.rounds}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        results.append(row)
        seconds = statistics.median(row["seconds_a_round"][1:])
        kept = row["bytes_after_rounds"]
        ends = (f"{kept[-1][role] / 1e6:.0f}, {_growth(kept, role) / 1e3:+.0f}" for role in ("driver", "workers"))
        print(f"{clients:8d} {row['peak_bytes'] / 1e6:10.0f} {seconds:10.2f} {next(ends):>25} {next(ends):>15}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(), "sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
