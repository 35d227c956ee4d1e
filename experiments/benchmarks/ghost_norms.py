"""Milliseconds of clipping one weight's per-example gradients: multiplied out, and by ghost norms.

The measured crossing point is to be compared with :func:`fedlora.adapters.stacked.ghost_norms_pay`, which chooses::

    python -m fedlora.experiments.benchmarks.ghost_norms --output ghost_norms.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedlora.adapters import RowLayout
from fedlora.adapters.stacked import RowProducts, ghost_norms_pay
from fedlora.experiments.benchmarks.machine import machine

SHAPES = [
    (64, 384, 8),
    (64, 384, 32),
    (64, 384, 64),
    (64, 384, 128),
    (64, 64, 64),
    (64, 128, 128),
    (64, 200, 200),
    (128, 1024, 16),
    (128, 1024, 64),
    (128, 200, 200),
    (1, 2, 384),
    (1, 20, 1024),
]
"""T, out and in: LoRA's B at several ranks, Fed-SB's R, heads."""


def measure(tokens: int, out_features: int, in_features: int, rows: int, clients: int, device: str) -> dict[str, Any]:
    """Time both ways of clipping and summing by client, on the same Poisson-like batch."""
    layout = RowLayout()
    counts = [rows // clients + (1 if k % 2 else -1) for k in range(clients)]
    layout.set_rows(counts)
    g = torch.randn(sum(counts), tokens, out_features, device=device)
    x = torch.randn(sum(counts), tokens, in_features, device=device)

    def explicit() -> torch.Tensor:
        samples = torch.bmm(g.transpose(1, 2), x)
        norms = torch.linalg.vector_norm(samples.flatten(1), dim=1)
        return layout.sum_rows(samples, (1 / norms).clamp(max=1))

    def ghost() -> torch.Tensor:
        products = RowProducts(g, x)
        return products.sum_rows(layout, (1 / products.norms()).clamp(max=1))

    assert torch.allclose(explicit(), ghost(), rtol=1e-2, atol=1e-3)
    return {
        "tokens": tokens,
        "out": out_features,
        "in": in_features,
        "chosen": "ghost" if ghost_norms_pay(tokens, out_features, in_features) else "explicit",
        "milliseconds": {"explicit": _median(explicit, device), "ghost": _median(ghost, device)},
    }


def _median(call: Callable[[], object], device: str, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def main() -> None:
    """Measure all shapes, print a table and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    print(f"{'T':>5} {'out':>6} {'in':>6} {'explicit':>10} {'ghost':>10}   ms, chosen")
    for shape in SHAPES:
        row = measure(*shape, arguments.rows, arguments.clients, device)
        results.append(row)
        times = row["milliseconds"]
        shown = f"{times['explicit']:10.2f} {times['ghost']:10.2f}   {row['chosen']}"
        print(f"{row['tokens']:5} {row['out']:6} {row['in']:6} {shown}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(), "shapes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
