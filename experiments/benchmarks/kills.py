"""Kill a run on Ray workers at random moments, its driver or a worker, and resume it: are the bits those of no kill?

Each SIGKILL comes at a moment that is drawn, from the start of the process on. A driver that was killed is started
again with ``--resume``. In the end the model, rounds.jsonl without its times, communication.csv and privacy.csv have to
be those of a run that nobody touched; so do those of a run of which only workers were killed. It exits with 1 where
they are not::

    python -m fedlora.experiments.benchmarks.kills --kills 20 --output kills.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fedlora.experiments.benchmarks.machine import machine
from fedlora.experiments.benchmarks.soak import digest

CONFIG: dict[str, Any] = {
    "run": {"name": "kills", "seed": 23, "rounds": 30},
    "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 16, "num_hidden_layers": 1},
    "data": {
        "name": "asset:rotten-tomatoes",
        "max_examples": 400,
        "max_test_examples": 20,
        "partition": {"clients": 12},
    },
    "method": {"name": "fedit", "rank": 4},
    "client": {"batch_size": 8, "local_steps": 4, "keep_optimizer_state": True},
    "privacy": {"mode": "example", "noise_multiplier": 1.0},
    "simulation": {"workers": 2},
}

_TIMES = ("seconds", "network")


class Victim:
    """A run in a process of its own, which can be killed and started again.

    Parameters
    ----------
    config : dict
    folder : Path
    """

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.folder = folder
        self._config = folder.with_suffix(".json")
        self._config.write_text(json.dumps(config))
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self) -> None:
        """Start it, or go on with it where it has begun."""
        # Before its first commit a run holds nothing: the folder is made anew.
        resume = (self.folder / "config.toml").exists()
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        command = [sys.executable, "-m", "fedlora.experiments.benchmarks.kills", "--child", str(self._config)]
        with self.folder.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--folder", str(self.folder), *(["--resume"] if resume else [])], stdout=log, stderr=log
            )
        self.starts += 1

    def ended(self, seconds: float) -> bool:
        """Wait for so long; return whether it ended by itself.

        Raises
        ------
        RuntimeError
            If it failed.
        """
        assert self._process is not None
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        if code:
            log = self.folder.with_suffix(".log").read_text(errors="replace")
            raise RuntimeError(f"the run ended with {code}: {log[-2000:]}")
        return True

    def rounds(self) -> int:
        """Return how many rounds it has done."""
        path = self.folder / "rounds.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def kill_driver(self) -> None:
        """End its process by SIGKILL, and what is left of its Ray after some seconds too."""
        assert self._process is not None
        started = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        _, alive = psutil.wait_procs(started, timeout=5)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()

    def kill_worker(self, rng: np.random.Generator) -> bool:
        """End one of its workers by SIGKILL; return whether there was one."""
        assert self._process is not None
        workers = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.Error):
                workers += [process] if process.name().startswith("ray::Worker") else []
        if not workers:
            return False
        with suppress(psutil.Error):
            workers[int(rng.integers(len(workers)))].kill()
        return True


def attack(victim: Victim, kills: Sequence[str], longest: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Kill a run so often, each time after a drawn time of up to ``longest`` seconds; then let it end.

    Parameters
    ----------
    victim : Victim
    kills : sequence of str
        ``driver`` or ``worker``, in this order. A worker is waited for where there is none yet.
    longest : float
    rng : numpy.random.Generator

    Returns
    -------
    list of dict
        What was killed, after how many seconds, and how many rounds were done. Fewer than asked for if the run ended.
    """
    done: list[dict[str, Any]] = []
    victim.start()
    for who in kills:
        seconds = float(rng.uniform(0, longest))
        if victim.ended(seconds):
            return done
        if who == "driver":
            victim.kill_driver()
            victim.start()
        else:
            while not victim.kill_worker(rng):
                if victim.ended(0.2):
                    return done
        done.append({"killed": who, "seconds": round(seconds, 2), "rounds": victim.rounds()})
    while not victim.ended(1.0):
        pass
    return done


def content(folder: Path) -> dict[str, Any]:
    """Return everything of a run that may not depend on what was killed."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return {
        "model": digest(folder),
        "rounds": [{k: v for k, v in line.items() if k not in _TIMES} for line in lines],
        **{name: (folder / name).read_text() for name in ("communication.csv", "privacy.csv")},
    }


def compare(kills: int, workers: int, longest: float, config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Run untouched, with both kinds of kills, and with workers killed alone; return what was found.

    Parameters
    ----------
    kills : int
        Of drivers and workers, drawn.
    workers : int
        Of workers, in runs of their own.
    longest : float
        Seconds until the next kill, at most.
    config : dict
    seed : int
    """
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        whole = Victim(config, Path(scratch) / "whole")
        attack(whole, [], longest, rng)
        found: dict[str, Any] = {"seconds_without_kills": time.monotonic() - began, "wrong": []}
        expected = content(whole.folder)
        found["model"] = expected["model"]
        drawn = [str(who) for who in rng.choice(["driver", "worker"], kills, p=[0.6, 0.4])]
        for name, left in (("killed", drawn), ("workers_killed", ["worker"] * workers)):
            found[name] = []
            while left:  # a run may end before all of them
                victim = Victim(config, Path(scratch) / f"{name}-{len(found[name])}")
                log = attack(victim, left, longest, rng)
                got, left = content(victim.folder), left[len(log) :]
                found[name].append({"kills": log, "starts": victim.starts, "model": got["model"]})
                found["wrong"] += [f"{name}: {key} differs" for key in expected if got[key] != expected[key]]
                if not log:
                    found["wrong"].append(f"{name}: the run ends before a kill")
                    break
        found["seconds"] = time.monotonic() - began
    return found


def main() -> None:
    """Kill, compare and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--longest", type=float, default=25.0)
    parser.add_argument("--rounds", type=int, default=CONFIG["run"]["rounds"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        from fedlora import simulate

        config = json.loads(arguments.child.read_text())
        simulate(config, output=arguments.folder, resume=arguments.resume)
        return
    config = {**CONFIG, "run": {**CONFIG["run"], "rounds": arguments.rounds}}
    found = compare(arguments.kills, arguments.workers, arguments.longest, config)
    print(json.dumps(found, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
