"""Seconds from the command to the first training step of ``fedlora run``, and where they go.

The floor is one process that imports torch, transformers, opacus, ray and flwr and puts the same weights on the device.
A case's first run finds no tokens in the cache, the others do; the floor is measured before each of these. Phases come
from :mod:`fedlora.timeline`, in all processes of a run. Clients train where the default has them; ``--workers 1`` gives
them a process on Ray, ``--workers 0`` the run's own::

    python -m fedlora.experiments.benchmarks.startup --cases minilm 1b --output startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedlora.assets import cache_dir, fetch, is_asset
from fedlora.experiments.benchmarks.llm import make_model, make_texts, run_config
from fedlora.experiments.benchmarks.machine import machine
from fedlora.timeline import FILE

HERE = Path(__file__)

FLOOR = """
import sys, time
import torch, transformers, opacus, ray, flwr
imports = time.time()
device = "cuda" if torch.cuda.is_available() else "cpu"
options = {"device_map": {"": device}} if device == "cuda" else {}
model = getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2], dtype="auto", **options)
float(next(model.parameters()).sum())
print(imports, time.time())
"""
"""Prints when the imports, and the weights, are there."""

RUN = "from fedlora.cli import main; main()"

STEP, PROBE = "step", "capacity"
"""Steps of a probe, which measures how many clients fit, are none of the training."""


def measure_floor(kind: str, model: str) -> dict[str, float]:
    """Return the seconds until the libraries are imported, and until the weights are on the device."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", FLOOR, kind, model], capture_output=True, text=True, check=True, timeout=600
    )
    imports, weights = map(float, done.stdout.split()[-2:])
    return {"imports": imports - began, "weights": weights - began}


def measure_run(config: Path, folder: Path, cache: Path, limit: float) -> dict[str, Any]:
    """Run a config; return the seconds until its first step begins, and all phases before, from the command on.

    Raises
    ------
    RuntimeError
        If the run fails.
    """
    timeline = folder / "timeline.jsonl"
    timeline.unlink(missing_ok=True)
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    environment = os.environ | {FILE: str(timeline), "FEDLORA_CACHE": str(cache)}
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", RUN, "run", str(config), "--output", str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    lines = [json.loads(line) for line in timeline.read_text(encoding="utf-8").splitlines()]
    probes = [line for line in lines if line["phase"] == PROBE]
    steps = [line["began"] for line in lines if line["phase"] == STEP]
    first = min(s for s in steps if not any(p["began"] <= s <= p["ended"] for p in probes)) - began
    driver = next(line["process"] for line in lines if line["phase"] == "gather")
    phases = [
        {
            "phase": line["phase"],
            "process": "driver" if line["process"] == driver else f"worker {line['process']}",
            "began": line["began"] - began,
            "seconds": line["ended"] - line["began"],
        }
        for line in sorted(lines, key=lambda line: line["began"])
        if line["began"] - began <= first
    ]
    return {"first_step": first, "phases": phases}


def prepare(case: dict[str, Any], settings: dict[str, Any], folder: Path) -> tuple[str, str]:
    """Write a case's config, model and data into a folder; return class and source of what the floor loads."""
    gpus = 1.0 if torch.cuda.is_available() else 0.0
    place, folder = folder, folder / "model"  # where nothing else is written: a run knows its model by the files
    folder.mkdir()
    if "shape" in case:
        # Its keys but the cases are those of llm.toml.
        llm = settings["llm"] | {"rounds": 1, "steps": 2}
        shape = llm["shapes"][case["shape"]]
        make_model(folder, shape)
        for file, rows in (("train", llm["clients"] * llm["batches"] * case["batch"]), ("test", case["batch"])):
            make_texts(folder / f"{file}.jsonl", rows, case["tokens"], shape["vocab_size"])
        content, kind, source = run_config(llm, case, folder), "LlamaForCausalLM", str(folder)
    else:
        content = tomllib.loads((HERE.parents[1] / case["config"]).read_text(encoding="utf-8"))
        content["model"]["name"] = case["model"]
        content["run"]["rounds"] = 1
        content["client"]["local_steps"] = 1
        content["server"]["fraction_train"] = 0.1  # what comes behind the first step is not looked at
        content["server"]["evaluate_start"] = case.get("evaluate_start", True)
        name = case["model"].removeprefix("asset:")
        kind, source = "AutoModel", str(fetch(name)) if is_asset(case["model"]) else name
    content["simulation"] = {"gpus_per_worker": gpus}
    if settings["workers"] is not None:
        content["simulation"]["workers"] = settings["workers"]
    (place / "config.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    return kind, source


def measure(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Measure one case: a run with an empty cache, then the floor and a run in turn."""
    with tempfile.TemporaryDirectory(prefix="startup-") as place:
        folder = Path(place)
        kind, source = prepare(case, settings, folder)
        cache = folder / "cache"
        cache.mkdir()
        (cache_dir() / "assets").mkdir(parents=True, exist_ok=True)
        (cache / "assets").symlink_to(cache_dir() / "assets")
        arguments = (folder / "config.toml", folder, cache, settings["seconds"])
        measure_floor(kind, source)  # reads the libraries from the disk
        found: dict[str, Any] = {"no tokens cached": measure_run(*arguments), "floor": [], "runs": []}
        for _ in range(settings["repeats"]):
            found["floor"].append(measure_floor(kind, source))
            found["runs"].append(measure_run(*arguments))
    return found


def report(name: str, found: dict[str, Any]) -> str:
    """Return a case's line, and its median run's phases, in Markdown."""
    floor = statistics.median(one["weights"] for one in found["floor"])
    runs = sorted(found["runs"], key=lambda run: run["first_step"])
    run = runs[len(runs) // 2]
    first, fresh = run["first_step"], found["no tokens cached"]["first_step"]
    lines = [
        f"{name}: floor {floor:.1f} s, first step {first:.1f} s (floor + {first - floor:.1f}), "
        f"without cached tokens {fresh:.1f} s (floor + {fresh - floor:.1f})",
        "",
        "| process | phase | began | seconds |",
        "|---|---|---|---|",
        *(f"| {p['process']} | {p['phase']} | {p['began']:.1f} | {p['seconds']:.2f} |" for p in run["phases"]),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure the chosen cases, print them and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE.with_suffix(".toml"))
    parser.add_argument("--cases", nargs="+", default=["minilm", "1b"])
    parser.add_argument("--model", help="in the place of a case's model, such as a folder")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    settings = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    settings["llm"] = tomllib.loads((HERE.parent / "llm.toml").read_text(encoding="utf-8"))
    settings |= {"repeats": arguments.repeats or settings["repeats"], "workers": arguments.workers}
    cases = {case["name"]: case for case in settings["cases"]}
    results: dict[str, Any] = {"machine": machine(), "settings": settings, "cases": {}}
    for name in arguments.cases:
        case = cases[name]
        if arguments.model and "model" in case:
            case = case | {"model": arguments.model}
        results["cases"][name] = measure(case, settings)
        print(report(name, results["cases"][name]), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
