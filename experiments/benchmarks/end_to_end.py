"""Where the time of a whole federation goes, and how long the same app takes on Flower's own simulation runtime.

::

    python -m fedlora.experiments.benchmarks.end_to_end --output end_to_end.json

``--set`` overrides keys of the config, as for ``fedlora run``. Flower's runtime runs ``--flower-rounds`` rounds (0: not
at all) for each share of a GPU a client that ``--flower-gpus`` names, and its seconds a round are compared; model, data
and privacy are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import ray

from fedlora import simulate
from fedlora.cli import parse_overrides
from fedlora.config import load_config
from fedlora.experiments.benchmarks.machine import ROOT, machine
from fedlora.strategies.federation import Progress

PARTS = ("train", "communicate", "aggregate", "evaluate")
"""Of a round, as rounds.jsonl has them; what is left of its wall time is written to the run folder."""


class Blocked:
    """Seconds that the driver waits for Ray: for training, and for what the worker does beside it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Blocked:
        self._before = ray.wait, ray.get
        ray.wait, ray.get = self._timed(ray.wait), self._timed(ray.get)
        return self

    def __exit__(self, *_: object) -> None:
        ray.wait, ray.get = self._before

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += perf_counter() - began

        return call


def measure_ours(config: str, overrides: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Simulate the config with RayGrid.

    A round's ``wall`` is from its predecessor's end to its own. ``wait`` is the part of ``communicate`` in which the
    driver waits for the worker to encode and send; in the rest it makes, packs, unpacks and counts messages.
    """
    ends: list[tuple[float, float]] = []
    with Blocked() as blocked:
        progress = Progress(on_round=lambda line: ends.append((perf_counter(), blocked.seconds)))
        result = simulate(config, overrides, output=folder, progress=progress)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    rounds = _rounds(lines)
    for seconds, (began, waited), (ended, waited_then) in zip(rounds[1:], ends[:-1], ends[1:], strict=True):
        seconds["wall"] = ended - began
        seconds["wait"] = min(seconds["communicate"], max(0.0, waited_then - waited - seconds["train"]))
    return {"summary": result.summary, "rounds": rounds, "config": (folder / "config.toml").read_text()}


def measure_flower(
    config: str, overrides: dict[str, Any], folder: Path, rounds: int, gpus: float, limit: float
) -> dict[str, Any]:
    """Run the same app with ``flwr run`` on Flower's local simulation, at most ``limit`` seconds."""
    toml = folder.with_suffix(".toml")
    loaded = load_config(config, {**overrides, "run.rounds": rounds})
    toml.write_text(loaded.to_toml(), encoding="utf-8")
    resources = f"num-supernodes={loaded.data.partition.clients} client-resources-num-cpus=1"
    if gpus:
        resources += f" client-resources-num-gpus={gpus}"
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(folder.with_name(f"home-{folder.name}")),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    Path(environment["FLWR_HOME"]).mkdir()
    run_config = f"config='{toml}' output='{folder}'"
    command = ["flwr", "run", str(ROOT), "local", "--stream", "--federation-config", resources]
    try:
        done = subprocess.run(
            [*command, "--run-config", run_config], env=environment, capture_output=True, text=True, timeout=limit
        )
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        output = f"not finished in {limit} s: {expired.stdout!r}"
    subprocess.run(["pkill", "-f", environment["FLWR_HOME"]])
    file = folder / "rounds.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {"rounds": _rounds(lines)} if len(lines) > 1 else {"error": output[-2000:]}


def _rounds(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [line["seconds"] for line in lines]


def _typical(rounds: list[dict[str, float]]) -> float:
    """Median seconds of a round's parts; the first round, which loads the models, does not count."""
    return statistics.median(sum(seconds[name] for name in PARTS) for seconds in (rounds[1:] or rounds))


def main() -> None:
    """Measure, print a table and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).with_suffix(".toml")))
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--flower-rounds", type=int, default=3)
    parser.add_argument("--flower-gpus", type=float, nargs="+", default=[1.0], help="a client's share of a GPU")
    parser.add_argument("--flower-limit", type=float, default=600.0, help="seconds")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    overrides = parse_overrides(arguments.set)
    with tempfile.TemporaryDirectory() as scratch:
        ours = measure_ours(arguments.config, overrides, Path(scratch) / "ours")
        results: dict[str, Any] = {"machine": machine(), "ours": ours}
        parts = {name: sum(r[name] for r in ours["rounds"][1:]) for name in PARTS}
        total = sum(r["wall"] for r in ours["rounds"][1:])
        print(f"rounds 2 to {len(ours['rounds'])}: {total:.1f} s, {_typical(ours['rounds']):.3f} s a round")
        parts["record"] = total - sum(parts.values())
        parts["wait"] = sum(r["wait"] for r in ours["rounds"][1:])
        parts["serialise"] = parts.pop("communicate") - parts["wait"]
        for name, seconds in parts.items():
            print(f"  {name:12} {seconds:7.2f} s {seconds / total:6.1%}")
        print("  whole run   ", {k: round(v, 1) for k, v in ours["summary"]["seconds"].items()})
        _write(arguments.output, results)
        for gpus in arguments.flower_gpus if arguments.flower_rounds else []:
            folder = Path(scratch) / f"flower-{gpus}"
            limit = arguments.flower_limit
            flower = measure_flower(arguments.config, overrides, folder, arguments.flower_rounds, gpus, limit)
            results.setdefault("flower", {})[str(gpus)] = flower
            _write(arguments.output, results)
            if "rounds" in flower:
                slow = _typical(flower["rounds"])
                ratio = slow / _typical(ours["rounds"])
                print(f"Flower's own runtime, {gpus} GPU a client: {slow:.2f} s a round, {ratio:.1f} times as long")
            else:
                print(f"Flower's own runtime, {gpus} GPU a client, failed:", flower["error"][-500:])


def _write(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
