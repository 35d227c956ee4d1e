"""Is a cohort on the CPU ever slower than its clients one at a time?

The same clients train under DP-SGD in one pass and one after the other, MiniLM's shape, on two cores::

    python -m fedlora.experiments.benchmarks.cohort_cpu --output cohort_cpu.json
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

import torch

from fedlora.experiments.benchmarks.cohort_speed import measure_cohort
from fedlora.experiments.benchmarks.machine import machine

BATCHES = [(1, 64), (4, 32), (32, 32)]
"""Examples and tokens of a batch."""

CLIENTS = [2, 8]


def main() -> None:
    """Measure, print a table and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = tomllib.loads(Path(__file__).with_name("cohort_speed.toml").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    print("batch x tokens  clients  one pass  one by one  ratio   (client steps a second)")
    for batch, tokens in BATCHES:
        size = settings["sizes"]["minilm"] | {"batch": batch, "tokens": tokens, "steps": arguments.steps}
        alone = measure_cohort(settings, size | {"cohort": 1}, "cpu", 2 * arguments.repeats, "none")
        for clients in CLIENTS:
            together = measure_cohort(settings, size | {"cohort": clients}, "cpu", arguments.repeats, "none")
            ratio = together["client_steps_a_second"] / alone["client_steps_a_second"]
            rows.append(
                {"batch": batch, "tokens": tokens, "clients": clients, "one_pass": together, "one_by_one": alone}
            )
            rates = f"{together['client_steps_a_second']:9.2f} {alone['client_steps_a_second']:11.2f}"
            print(f"{f'{batch} x {tokens}':>14} {clients:8} {rates} {ratio:6.2f}", flush=True)
    slowest = min(r["one_pass"]["client_steps_a_second"] / r["one_by_one"]["client_steps_a_second"] for r in rows)
    print(f"the least ratio is {slowest:.2f}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
