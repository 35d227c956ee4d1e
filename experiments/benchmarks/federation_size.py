"""Does memory, or the time of a round, grow with the federation? 1,000 clients against 10,000, of which 100 train.

Each size runs in a process of its own, with its own Ray. The peak is that of the driver and of all processes below it
together (proportional set size, so that shared pages count once), read five times a second::

    python -m fedlora.experiments.benchmarks.federation_size --output federation_size.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

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


def measure(clients: int, given: list[str]) -> dict[str, Any]:
    """Run a federation of so many clients in this process; return seconds a round and peak bytes."""
    from fedlora import simulate
    from fedlora.cli import parse_overrides

    overrides = parse_overrides(given) | {"data.partition.clients": clients, "server.fraction_train": 100 / clients}
    with tempfile.TemporaryDirectory() as scratch, _PeakMemory() as memory:
        folder = Path(scratch) / "run"
        simulate(CONFIG, overrides, output=folder)
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return {
        "clients": clients,
        "peak_bytes": memory.peak,
        "peak_bytes_by_process": memory.by_name,
        "seconds_a_round": [sum(line["seconds"].values()) for line in lines],
    }


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
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.set)))
        return
    results = []
    print(f"{'clients':>8} {'peak MB':>10} {'s a round':>10}")
    for clients in arguments.clients:
        command = [sys.executable, "-m", "fedlora.experiments.benchmarks.federation_size", "--child", str(clients)]
        command += ["--set", *arguments.set]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        results.append(row)
        seconds = statistics.median(row["seconds_a_round"][1:])
        print(f"{clients:8d} {row['peak_bytes'] / 1e6:10.0f} {seconds:10.2f}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(), "sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
