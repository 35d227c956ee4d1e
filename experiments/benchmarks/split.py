"""A language model on one GPU against the same split over two, and one worker against two: numbers, seconds, memory.

``equality`` takes the logits, the gradients of two clients and the steps of DP-SGD with noise and dropout on one GPU
and on two, in float32, and gives the largest differences as shares of the largest number. The other rows are whole
federations under DP with the defaults of ``fedlora run``: in one process, on one GPU and on two; and on Ray, with one
worker of a GPU and with two. Every measurement runs in a process of its own. Memory of a GPU is the most that was in
use, of all processes, looked at every 20 ms. ``lent`` says how many base models the workers had from the server::

    python -m fedlora.experiments.benchmarks.split --cases tiny 1b 8b --output split.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.experiments.benchmarks.llm import make_model, make_texts, run_config
from fedlora.experiments.benchmarks.machine import machine
from fedlora.experiments.benchmarks.own_process import run_module

SECONDS = 300
"""A measurement that takes longer is given up."""

PLACES = {"one GPU": (0, 1), "two GPUs": (0, 2), "one worker": (1, 1), "two workers": (2, 1)}
"""Workers (0: in the run's own process), and GPUs of each."""


def content(settings: dict[str, Any], case: dict[str, Any], folder: Path, run: str = "one GPU") -> dict[str, Any]:
    """Return the config of a run."""
    workers, gpus = PLACES[run]
    placed = {
        "workers": workers,
        "gpus_per_worker": float(gpus) if torch.cuda.is_available() else 0.0,
        "cohort_size": 1,  # so that the rows divide the same work
    }
    return {**run_config(settings, case, folder), "simulation": placed}


def equality(settings: dict[str, Any], case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the largest differences between one device and two, and where the parameters of the two are."""
    from fedlora.config import load_config

    given = content(settings, case, folder)
    given["model"]["dtype"] = "float32"
    given["method"]["dropout"] = 0.1
    given["client"] |= {"batch_size": 2, "local_steps": 2}
    config = load_config(given)
    devices = [torch.device("cuda", n) if torch.cuda.is_available() else torch.device("cpu") for n in range(2)]
    one, _ = _numbers(config, devices[:1])
    two, parameters = _numbers(config, devices)
    apart = {}
    for name, arrays in one.items():
        largest = max(float(array.abs().max()) for array in arrays)
        both = zip(arrays, two[name], strict=True)
        apart[name] = max(float((first - second).abs().max()) for first, second in both) / largest
    return {"differences": apart, "parameters": parameters}


def _numbers(config: Any, devices: list[torch.device]) -> tuple[dict[str, list[torch.Tensor]], dict[str, int]]:
    """Return logits, gradients, and how training moved the arrays; and the number of parameters on each device."""
    from fedlora.clients.resources import client_data
    from fedlora.methods import get_method
    from fedlora.models import load_base
    from fedlora.privacy import PrivacyPlan
    from fedlora.training import ClientJob, train_cohort

    data = client_data(config)
    table = data.train
    adapted = get_method(config.method.name).adapt(load_base(config, data.label_names, devices), config)
    adapted.set_shared(adapted.drawn(0))
    rows, found = np.arange(3), {}
    batch = table.batch(rows, adapted.device)
    adapted.layout.set_rows([1, 2])
    with torch.no_grad():
        found["logits"] = [adapted.logits(batch).float().cpu()]
    start = adapted.arrays()
    adapted.set_clients([start, start])
    adapted.model.train()
    table.task.loss(adapted.outputs(batch, table.task), batch["labels"]).sum().backward()
    found["gradients"] = [p.grad.cpu() for p in adapted.parameters() if p.grad is not None]
    for name, sigma in (("clipped steps", 0.0), ("noised steps", 1.0)):
        plan = PrivacyPlan(0.2, sigma, 1.0, 2.0, 1, 1e-3, "rdp", None)
        jobs = [ClientJob(k, 1, np.arange(12 * k, 12 * k + 12 - 3 * k), start, 1e-3, plan) for k in range(2)]
        moved = [result.arrays for result in train_cohort(adapted, table, jobs, config)]
        found[name] = [arrays[n] - start[n] for arrays in moved for n in arrays]
    counts = {str(d): sum(p.numel() for p in adapted.model.parameters() if p.device == d) for d in adapted.devices}
    return found, counts


def federation(settings: dict[str, Any], case: dict[str, Any], run: str, folder: Path) -> dict[str, Any]:
    """Return seconds of each round's training after the first, the result, and the GPUs' memory."""
    from fedlora import shared_base, simulate

    lent: list[int] = []
    lend = shared_base.lend

    def counted() -> list[shared_base.Loan]:
        loans = lend()
        lent.append(len(loans))
        return loans

    shared_base.lend = counted
    with tempfile.TemporaryDirectory() as place, _memory() as used:
        result = simulate(content(settings, case, folder, run), output=Path(place) / "run")
        lines = [json.loads(line) for line in (Path(place) / "run" / "rounds.jsonl").read_text().splitlines()]
        log = (Path(place) / "run" / "run.log").read_text()
    seconds = [line["seconds"]["train"] for line in lines[1:]]
    cards = range(torch.cuda.device_count())
    return {
        "seconds": seconds,
        "median": statistics.median(seconds),
        "loss": result.summary["final"]["loss"],
        "load_seconds": result.summary["seconds"]["load"],
        "used_bytes": list(used),
        "peak_bytes": [torch.cuda.max_memory_allocated(card) for card in cards],  # of this process
        "kept_bytes": [torch.cuda.memory_allocated(card) for card in cards],  # when all is over
        "lent": max(lent, default=0),
        "not_lent": [line for line in log.splitlines() if "lend" in line or "lent" in line],
    }


@contextmanager
def _memory() -> Iterator[list[int]]:
    """Watch how much memory of each GPU is in use, beyond what is at the start."""

    def used() -> list[int]:
        return [total - free for free, total in map(torch.cuda.mem_get_info, range(torch.cuda.device_count()))]

    highest, over = [0] * torch.cuda.device_count(), threading.Event()
    before = used()

    def watch() -> None:
        while not over.wait(0.02):
            highest[:] = [max(h, u - b) for h, u, b in zip(highest, used(), before, strict=True)]

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield highest
    finally:
        over.set()
        thread.join()


def _child(arguments: argparse.Namespace, case: str, run: str, folder: Path) -> dict[str, Any]:
    return run_module(__spec__.name, ["--config", str(arguments.config), "--child", case, run, str(folder)], SECONDS)


def _shown(case: str, run: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{case:6} {run:12} {row['error']}"
    if "differences" in row:
        apart = ", ".join(f"{name} {share:.1e}" for name, share in row["differences"].items())
        return f"{case:6} {run:12} {apart}; parameters {row['parameters']}"
    used, peak, kept = (
        " + ".join(f"{size / 2**30:.1f}" for size in row[key]) for key in ("used_bytes", "peak_bytes", "kept_bytes")
    )
    times = f"{row['median']:8.3f} s a round, loss {row['loss']:.6f}, loaded in {row['load_seconds']:.1f} s"
    memory = f"GiB used {used or 0} (the server's torch {peak or 0}, at the end {kept or 0})"
    return f"{case:6} {run:12} {times}, {memory}, lent {row['lent']} {' '.join(row['not_lent'])}"


def main() -> None:
    """Measure the chosen cases, print a table and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--cases", nargs="+", default=["tiny", "1b", "8b"])
    parser.add_argument("--runs", nargs="+", help="only these of a case's runs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("CASE", "RUN", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    cases = {case["name"]: case for case in settings["cases"]}
    if arguments.child:
        name, run, place = arguments.child
        if run == "equality":
            print(json.dumps(equality(settings, cases[name], Path(place))))
        else:
            print(json.dumps(federation(settings, cases[name], run, Path(place))))
        return
    results: dict[str, Any] = {"machine": machine(), "settings": settings, "cases": {}}
    for name in arguments.cases:
        case, rows = cases[name], results["cases"].setdefault(name, {})
        shape = settings["shapes"][case["shape"]]
        folder = Path(tempfile.mkdtemp(prefix="split-"))
        began = time.perf_counter()
        make_model(folder, shape)
        for file, batches in (("train", settings["clients"] * settings["batches"]), ("test", 1)):
            make_texts(folder / f"{file}.jsonl", batches * case["batch"], case["tokens"], shape["vocab_size"])
        print(f"{name:6} made in {time.perf_counter() - began:.0f} s", flush=True)
        for run in case["runs"]:
            if not arguments.runs or run in arguments.runs:
                rows[run] = _child(arguments, name, run, folder)
                print(_shown(name, run, rows[run]), flush=True)
                if arguments.output:
                    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
