"""A long federation in which a fifth of the clients fail, in every way there is: is anything lost, does memory grow?

200 rounds of 50 clients on Ray workers. Clients raise, send what is not finite, of other shapes, too large, cut off or
nonsense, are late, end their worker once (their message runs again) or always. Once the disk is full, and the run is
resumed. Then it is checked that

- every round counts, and leaves out exactly the clients that failed, and those whose turn was behind a late one;
- the model is bit for bit that of a run in this process in which exactly these were absent;
- each client's ledger holds the steps that privacy.csv lists;
- the memory of the driver and of the workers does not grow over the last 60 rounds, in which no process starts.

It exits with 1 where one of these does not hold::

    python -m fedlora.experiments.benchmarks.soak --output soak.json
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fedlora.experiments.benchmarks.faulty_app import PLAN
from fedlora.experiments.benchmarks.machine import machine

APP = "fedlora.experiments.benchmarks.faulty_app:app"
CONFIG: dict[str, Any] = {
    "run": {"name": "soak", "seed": 17},
    "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 16, "num_hidden_layers": 1},
    "data": {"name": "asset:rotten-tomatoes", "max_examples": 1000, "max_test_examples": 20},
    "method": {"name": "fed-sb", "rank": 4},
    "client": {"batch_size": 2, "local_steps": 1},
    "privacy": {"mode": "example", "noise_multiplier": 1.0},
    "server": {"evaluate_every": 50, "max_round_retries": 2},
    "simulation": {"workers": 2},
}
SHARE = 0.2
"""Share of the clients that fail in a round."""

KINDS = {
    "exception": 0.25, "nan": 0.2, "shape": 0.15, "oversize": 0.13, "truncated": 0.13, "nonsense": 0.113,
    "late": 0.01, "killed": 0.014, "deadly": 0.003,
}  # fmt: skip
"""What fails how often; those that end workers or wait for a deadline take seconds each."""

ENDING = ("late", "killed", "deadly")
"""Kinds that end workers: in the first half of the rounds, so that those of the second half live long."""

CODES = {"exception": "failed", "late": "late", "deadly": "worker_died"}
"""In left_out.csv; ``reply`` for others, and a killed one is not in it."""

GROWTH = 100_000.0
"""Bytes a round by which memory may grow: 2 KB a client message, less than one update (3 KB). Much less cannot be told
from the allocator: the driver's memory goes up and down by 5 MB."""


def draw_faults(rounds: int, clients: int, seed: int, kinds: Mapping[str, float] = KINDS) -> dict[str, str]:
    """Return who fails how, by ``ROUND/CLIENT``; one late client a round at most, and none in the first round."""
    rng = np.random.default_rng(seed)
    faults = {}
    for server_round in range(1, rounds + 1):
        failing = np.flatnonzero(rng.random(clients) < SHARE)
        for client, kind in zip(failing, rng.choice(list(kinds), len(failing), p=list(kinds.values())), strict=True):
            faults[f"{server_round}/{client}"] = str(kind)
        late = [client for client in failing if faults[f"{server_round}/{client}"] == "late"]
        ending = [client for client in failing if faults[f"{server_round}/{client}"] in ENDING]
        for client in ending if server_round > rounds // 2 else late[server_round > 1 :]:
            faults[f"{server_round}/{client}"] = "exception"
    return faults


class Memory:
    """Resident bytes of this process and of the workers, by round.

    Attributes
    ----------
    driver : list of int
    workers : dict of int to list of (int, int)
        By process id, round and bytes.
    """

    def __init__(self) -> None:
        self.driver: list[int] = []
        self.workers: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def sample(self, line: Mapping[str, Any]) -> None:
        """Note what is there after a round."""
        self.driver.append(psutil.Process().memory_info().rss)
        for process in psutil.Process().children(recursive=True):
            try:
                if process.name().startswith("ray::Worker"):
                    self.workers[process.pid].append((int(line["round"]), process.memory_info().rss))
            except psutil.Error:  # it ended meanwhile
                continue

    def growth(self, after: int) -> dict[str, float]:
        """Return the slope in bytes a round after a round: the driver's, and the steepest worker's that lived since."""
        lives = [[size for n, size in life if n > after] for life in self.workers.values()]
        slopes = [slope(life) for life in lives if len(life) == len(self.driver) - after]
        return {"driver": slope(self.driver[after:]), "worker": max(slopes, default=math.inf)}


def slope(values: list[int]) -> float:
    """Return the slope by Theil and Sen, the median over all pairs: single jumps do not count."""
    y, x = np.asarray(values, float), np.arange(len(values))
    i, j = np.triu_indices(len(values), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i]))) if len(values) > 1 else 0.0


def run(config: Mapping[str, Any], folder: Path, faults: Mapping[str, str], full_after: int, memory: Memory) -> int:
    """Run with faults, and a full disk after a round; return how often the run was resumed."""
    from fedlora import simulate
    from fedlora.storage import StorageError
    from fedlora.strategies.callbacks import Progress

    _plan(folder.with_suffix(".plan"), faults)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resumed = 0

    def on_round(line: dict[str, Any]) -> None:
        memory.sample(line)
        if line["round"] == full_after and not resumed:
            # As a quota: no file of this process may grow beyond what the checkpoint is.
            size = (folder / "checkpoint" / "state.sqlite").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    while True:
        try:
            simulate(config, output=folder, client_app=APP, resume=resumed > 0, progress=Progress(on_round=on_round))
            return resumed
        except StorageError:
            resumed += 1
            if resumed > 3:
                raise
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def replay(config: Mapping[str, Any], folder: Path, absent: Mapping[str, str]) -> None:
    """Run in this process, with these clients absent."""
    from fedlora import simulate

    _plan(folder.with_suffix(".plan"), dict.fromkeys(absent, "absent"))
    alone = {**config, "simulation": {"workers": 0}}
    simulate(alone, output=folder, client_app=APP)


def _plan(path: Path, faults: Mapping[str, str]) -> None:
    from fedlora.experiments.benchmarks import faulty_app

    marks = path.with_suffix(".marks")
    marks.mkdir(exist_ok=True)
    path.write_text(json.dumps({"faults": faults, "folder": str(marks)}))
    os.environ[PLAN] = str(path)
    faulty_app._plan.cache_clear()


def left_out(folder: Path) -> dict[str, str]:
    """Return the code of left_out.csv by ``ROUND/CLIENT``."""
    with (folder / "left_out.csv").open(newline="") as stream:
        return {f"{row['round']}/{row['client']}": row["code"] for row in csv.DictReader(stream)}


def check_left_out(faults: Mapping[str, str], found: Mapping[str, str]) -> tuple[list[str], int]:
    """Return what of left_out.csv is wrong, and how many clients were late only since another one was."""
    expected = {place: CODES.get(kind, "reply") for place, kind in faults.items() if kind != "killed"}
    late = {place.partition("/")[0] for place, code in expected.items() if code == "late"}
    wrong, behind = [], 0
    for place in sorted(expected.keys() | found.keys()):
        there, code = found.get(place), expected.get(place)
        if there == code:
            continue
        if place.partition("/")[0] in late and there in ("late", "no_reply"):
            behind += 1
        else:
            wrong.append(f"{place}: {there}, not {code}")
    return wrong, behind


def check_ledgers(folder: Path) -> list[str]:
    """Return the clients whose ledger differs from the sum of their lines in privacy.csv."""
    from fedlora.privacy import Ledger
    from fedlora.results.checkpoint import Checkpoint

    with (folder / "privacy.csv").open(newline="") as stream:
        listed: Counter[int] = Counter()
        for row in csv.DictReader(stream):
            listed[int(row["client"])] += int(row["steps"])
    checkpoint = Checkpoint(folder / "checkpoint" / "state.sqlite")
    try:
        charged = {client: Ledger.from_record(state["ledger"]).steps for client, state in checkpoint.states.items()}
    finally:
        checkpoint.close()
    return [f"client {c}: {charged.get(c)} charged, {n} listed" for c, n in listed.items() if charged.get(c) != n]


def check_growth(growth: Mapping[str, float]) -> list[str]:
    """Return which processes grow."""
    return [f"the {who} grows by {size:.0f} bytes a round" for who, size in growth.items() if size > GROWTH]


def digest(folder: Path) -> str:
    """Hash what was trained."""
    files = sorted((folder / "adapter").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def soak(rounds: int, clients: int, deadline: float, kinds: Mapping[str, float] = KINDS) -> dict[str, Any]:
    """Run, replay and compare.

    Parameters
    ----------
    rounds, clients : int
    deadline : float
        ``server.round_deadline``.
    kinds : mapping of str to float
        Kinds of faults, with their shares.

    Returns
    -------
    dict
        What was measured; ``wrong`` lists what does not hold.
    """
    server = {**CONFIG["server"], "round_deadline": deadline}
    config = {**CONFIG, "run": {**CONFIG["run"], "rounds": rounds}, "server": server}
    config["data"] = {**CONFIG["data"], "partition": {"clients": clients}}
    faults, memory, began = draw_faults(rounds, clients, CONFIG["run"]["seed"], kinds), Memory(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder, again = Path(scratch) / "soak", Path(scratch) / "replay"
        resumed = run(config, folder, faults, rounds // 2, memory)
        seconds = time.monotonic() - began
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        out = left_out(folder)
        wrong, behind = check_left_out(faults, out)
        wrong += [f"round {line['round']} does not count" for line in lines if not line["counted"]]
        wrong += [f"round {n} is missing" for n in range(1, rounds + 1) if n not in {line["round"] for line in lines}]
        wrong += check_ledgers(folder)
        replay(config, again, out)
        bits = digest(folder), digest(again)
    wrong += [] if bits[0] == bits[1] else ["the model is another than that of who answered"]
    wrong += [] if resumed == 1 else [f"the full disk was met {resumed} times"]
    # The run was resumed, and its workers started, after half of the rounds.
    growth = memory.growth(7 * rounds // 10)
    wrong += check_growth(growth) if rounds >= 100 else []  # fewer tell nothing
    return {
        "rounds": rounds,
        "clients": clients,
        "seconds": seconds,
        "faults": dict(Counter(faults.values())),
        "left_out": dict(Counter(out.values())),
        "behind_a_late_one": behind,
        "workers_started": len(memory.workers),
        "resumed": resumed,
        "model": bits[0],
        "replayed_model": bits[1],
        "bytes_a_round": growth,
        "driver_bytes": memory.driver,
        "worker_bytes": {str(pid): [*map(list, life)] for pid, life in memory.workers.items()},
        "wrong": wrong,
    }


def report(found: Mapping[str, Any], show: Callable[[str], None] = print) -> None:
    """Print what was found."""
    megabytes = [size / 1e6 for size in found["driver_bytes"]]
    show(f"{found['rounds']} rounds of {found['clients']} clients in {found['seconds']:.0f} s")
    show(f"faults: {found['faults']}")
    show(f"left out: {found['left_out']}, of whom {found['behind_a_late_one']} were behind a late one")
    show(f"workers: {found['workers_started']}; resumed after a full disk: {found['resumed']}")
    show(f"model {found['model'][:16]}, replayed {found['replayed_model'][:16]}")
    show(f"driver: {megabytes[0]:.0f} MB after the first round, {megabytes[-1]:.0f} MB after the last")
    show("bytes a round: " + ", ".join(f"{who} {size:.0f}" for who, size in found["bytes_a_round"].items()))
    for text in found["wrong"]:
        show(f"WRONG: {text}")


def main() -> None:
    """Run the soak and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--deadline", type=float, default=20.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--read", type=Path, help="report an earlier run, its memory by the bound of today")
    arguments = parser.parse_args()
    if arguments.read:
        found = json.loads(arguments.read.read_text(encoding="utf-8"))
        found["wrong"] = [text for text in found["wrong"] if "grows" not in text] + check_growth(found["bytes_a_round"])
        report(found)
        return
    found = soak(arguments.rounds, arguments.clients, arguments.deadline)
    report(found)
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(), **found}) + "\n")
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
