"""What a simulation says that it does: its own phases, and those of its workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedlora import simulate, timeline
from fedlora.timeline import Phase, describe
from tests.study.studies import TINY

ROOT = Path(__file__).parents[2]

WORKERS = """
import json, os, time
os.nice(3)
import ray
from fedlora.simulation.ray_workers import RayWorkers
workers = RayWorkers("tests.simulation.apps:plain", 1, 1, 0.0, None)
said, (starting,) = [workers.doing()], workers._starting
while not ray.wait([starting], timeout=0.05)[0]:
    said.append(workers.doing())
niceness = ray.get(ray.remote(num_cpus=0)(lambda: os.nice(0)).remote())
folder = workers._folder.name
workers.close()
print(json.dumps({"said": said, "niceness": niceness - os.nice(0), "left": os.path.exists(folder)}))
"""


def test_workers_say_what_they_do_at_the_callers_priority() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_worker_niceness", None)
    done = subprocess.run([sys.executable, "-c", WORKERS], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["said"][0] == "starting workers 0/1"
    # It may be too quick to be seen importing.
    assert {text.partition(" (")[0] for text in found["said"][1:]} <= {
        "starting workers 0/1",
        "importing libraries",
        "",
    }
    assert (found["niceness"], found["left"]) == (0, False)


class Recorded(list[Phase]):
    """Notes what is told whenever a phase begins."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def append(self, phase: Phase) -> None:
        super().append(phase)
        self.told.append(describe())


def test_a_run_says_what_it_does_with_counts(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    recorded = Recorded()
    monkeypatch.setattr(timeline, "_active", recorded)
    config: dict[str, Any] = {**TINY["base"], "simulation": {"workers": 0}}
    simulate(config, {"run.name": "said"}, output=tmp_path / "run")
    assert recorded == []
    told = "\n".join(recorded.told)
    for part in (
        "preparing the data",
        "calibrating the noise",
        "loading the model",
        "evaluating 0/30",
        "rounds 0/2, training clients 0/2",
        "rounds 0/2, training clients 0/2, local steps 0/2",
        "training clients 1/2 (",
        "rounds 1/2 (",
        "writing the result",
    ):
        assert part in told, part
