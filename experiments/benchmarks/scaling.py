"""How much faster a round is with 1, 2, 4 and 8 workers, one per GPU; without a GPU, with 1 and 2 on the CPU.

Every client trains in every round, with example-level DP. Strong scaling keeps the number of clients, weak scaling the
number of clients per worker. Efficiency is the share of the ideal speed-up, by the median round after the first. Of a
round's seconds, ``train`` is the training of the busiest worker; for the rest workers wait for the driver or for each
other. ``driver`` is the time in which the driver works, much of it while workers train. Each run has its own process::

    python -m fedlora.experiments.benchmarks.scaling --output scaling.json
    python -m fedlora.experiments.benchmarks.scaling --read scaling.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedlora.experiments.benchmarks.llm import make_model, make_texts
from fedlora.experiments.benchmarks.machine import machine
from fedlora.experiments.benchmarks.own_process import run_module

SECONDS = 400
"""A run that takes longer is given up."""

LABELS = 2


def run_config(settings: dict[str, Any], case: dict[str, Any], clients: int, workers: int, folder: Path) -> Any:
    """Return the config of a run on the model and the texts in a folder."""
    bert = settings["shapes"][case["shape"]].get("architecture") == "bert"
    model = {"task": "sequence-classification", "pooling": "mean"} if bert else {"task": "causal-lm"}
    gpu = torch.cuda.is_available()
    return {
        "run": {"rounds": settings["rounds"]},
        "model": {
            "name": str(folder),
            "dtype": "bfloat16" if gpu else "float32",
            "max_length": case["tokens"],
            **model,
        },
        "data": {
            "name": str(folder / f"train-{clients}.jsonl"),
            "test": str(folder / "test.jsonl"),
            "partition": {"clients": clients},
        },
        "method": case["method"],
        "client": {"batch_size": case["batch"], "local_steps": case["steps"]},
        "server": {"evaluate_every": settings["rounds"], "evaluate_start": False},
        "privacy": {"mode": "example", "noise_multiplier": settings["noise_multiplier"], "target_delta": 1e-3},
        "simulation": {
            "workers": workers,
            "gpus_per_worker": 1.0 if gpu else 0.0,
            "cohort_size": case.get("cohort", "auto"),
        },
    }


def sizes(case: dict[str, Any], numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield workers and clients of a case's runs: one for both kinds of scaling where they are the same."""
    for workers in numbers:
        yield from sorted({(workers, case["clients"]), (workers, case["clients"] * workers)})


def measure(content: dict[str, Any]) -> dict[str, Any]:
    """Run a federation in this process; return the seconds of each round after the first, by what they went to."""
    from fedlora import simulate
    from fedlora.experiments.benchmarks.end_to_end import Blocked
    from fedlora.strategies.callbacks import Progress

    ends: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as place, Blocked() as blocked:

        def end(_: dict[str, Any]) -> None:
            ends.append((time.perf_counter(), blocked.seconds, time.thread_time()))

        result = simulate(content, output=Path(place) / "run", progress=Progress(on_round=end))
        lines = [json.loads(line) for line in (Path(place) / "run" / "rounds.jsonl").read_text().splitlines()]
        chosen = tomllib.loads((Path(place) / "run" / "config.toml").read_text())
    rounds = []
    for line, before, after in zip(lines[1:], ends[:-1], ends[1:], strict=True):
        wall, waited, cpu = (now - then for then, now in zip(before, after, strict=True))
        rounds.append({**line["seconds"], "wall": wall, "driver": wall - waited, "driver_cpu": cpu})
    summary = result.summary
    return {
        "rounds": rounds,
        "cohort": chosen["simulation"]["cohort_size"],
        "load_seconds": summary["seconds"]["load"],
        "uplink_bytes": summary["communication"]["uplink_bytes"],
        "failed": sum(len(line["failed"]) for line in lines),
    }


def typical(row: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of a run's rounds."""
    return {name: statistics.median(seconds[name] for seconds in row["rounds"]) for name in row["rounds"][0]}


def efficiency(rows: list[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """Return clients a second and worker, as a share of those of the run on one worker, if that is there."""

    def speed(of: dict[str, Any]) -> float:
        return float(of["clients"] / of["workers"] / typical(of)["wall"])

    alone = [other for other in rows if other["workers"] == 1 and "rounds" in other]
    return speed(row) / speed(alone[0]) if alone else None


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table of raw results."""
    yield "| case | workers | clients | scaling | s a round | of ideal | training | driver | its CPU, ms a client |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, rows in results["cases"].items():
        for row in rows:
            cells = _figures(row, rows) if "rounds" in row else [row["error"][:80], *[""] * 5]
            yield f"| {' | '.join([name, str(row['workers']), format(row['clients'], ','), *cells])} |"


def _figures(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    spent, ideal = typical(row), efficiency(rows, row)
    return [
        "both" if row["workers"] == 1 else "weak" if row["clients"] > rows[0]["clients"] else "strong",
        f"{spent['wall']:.2f}",
        "" if ideal is None else f"{ideal:.2f}",
        *(f"{spent[name] / spent['wall']:.0%}" for name in ("train", "driver")),
        f"{1000 * spent['driver_cpu'] / row['clients']:.2f}",
    ]


def _child(content: dict[str, Any]) -> dict[str, Any]:
    return run_module(__spec__.name, ["--child", json.dumps(content)], SECONDS)


def run_case(settings: dict[str, Any], case: dict[str, Any], numbers: list[int]) -> Iterator[dict[str, Any]]:
    """Make a case's model and texts, and measure it on each number of workers."""
    shape = settings["shapes"][case["shape"]]
    folder = Path(tempfile.mkdtemp(prefix="scaling-"))
    labels = LABELS if shape.get("architecture") == "bert" else 0
    try:
        make_model(folder, shape)
        make_texts(folder / "test.jsonl", case["batch"], case["tokens"], shape["vocab_size"], labels)
        for workers, clients in sizes(case, numbers):
            file, rows = folder / f"train-{clients}.jsonl", clients * settings["batches"] * case["batch"]
            if not file.exists():
                make_texts(file, rows, case["tokens"], shape["vocab_size"], labels)
            began = time.perf_counter()
            found = _child(run_config(settings, case, clients, workers, folder))
            yield {"workers": workers, "clients": clients, "seconds": time.perf_counter() - began, **found}
    finally:
        shutil.rmtree(folder)


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--cases", nargs="+", help="by default minilm and llama-1b on GPUs, and tiny without")
    parser.add_argument("--workers", type=int, nargs="+", help="instead of the config's")
    parser.add_argument("--rounds", type=int, help="instead of the config's")
    parser.add_argument("--cohort", type=int, help="clients in a pass, instead of what a run chooses")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--read", type=Path, help="only print the table of raw results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure the chosen cases, print a table and write the raw figures."""
    arguments = parsed()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    if arguments.read:
        print("\n".join(table(json.loads(arguments.read.read_text(encoding="utf-8")))))
        return
    settings = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    settings["rounds"] = arguments.rounds or settings["rounds"]
    cards = torch.cuda.device_count()
    numbers = arguments.workers or [n for n in settings["workers"] if n <= cards] or settings["cpu_workers"]
    cohort = {"cohort": arguments.cohort} if arguments.cohort else {}
    cases = {case["name"]: case | cohort for case in settings["cases"]}
    results: dict[str, Any] = {"machine": machine() | {"gpus": cards}, "settings": settings, "cases": {}}
    for name in arguments.cases or (["minilm", "llama-1b"] if cards else ["tiny"]):
        rows = results["cases"].setdefault(name, [])
        for row in run_case(settings, cases[name], numbers):
            rows.append(row)
            print(f"{name}, {row['workers']} workers, {row['clients']} clients: {row['seconds']:.0f} s", flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
