"""Does memory, or the time of a round, grow with the federation? 1,000 clients against 10,000, of which 100 train.

Each size runs in a process of its own; the peak is that of the driver plus that of the largest worker::

    python -m experiments.benchmarks.federation_size --output federation_size.json
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.benchmarks.machine import machine

CONFIG: dict[str, Any] = {
    "run": {"name": "federation-size", "rounds": 5},
    "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 32, "num_hidden_layers": 1},
    "data": {"name": "asset:rotten-tomatoes", "max_examples": 10000, "max_test_examples": 200},
    "method": {"name": "fed-sb"},
    "client": {"batch_size": 1, "local_steps": 2},
    "privacy": {"mode": "example", "noise_multiplier": 1.0},
    "simulation": {"workers": 1, "cohort_size": 20},
}


def measure(clients: int) -> dict[str, Any]:
    """Run a federation of so many clients in this process; return seconds a round and peak bytes."""
    from fedlora import simulate

    overrides = {"data.partition.clients": clients, "server.fraction_train": 100 / clients}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        simulate(CONFIG, overrides, output=folder)
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "clients": clients,
        "peak_driver_bytes": own * 1024,
        "peak_child_bytes": workers * 1024,
        "seconds_a_round": [sum(line["seconds"].values()) for line in lines],
    }


def main() -> None:
    """Measure both sizes, print a table and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    results = []
    print(f"{'clients':>8} {'driver MB':>10} {'child MB':>9} {'s a round':>10}")
    for clients in arguments.clients:
        command = [sys.executable, "-m", "experiments.benchmarks.federation_size", "--child", str(clients)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        results.append(row)
        seconds = statistics.median(row["seconds_a_round"][1:])
        driver, child = row["peak_driver_bytes"] / 1e6, row["peak_child_bytes"] / 1e6
        print(f"{clients:8d} {driver:10.0f} {child:9.0f} {seconds:10.2f}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(), "sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
