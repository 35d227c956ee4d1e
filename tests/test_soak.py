"""The soak and the kills of experiments/benchmarks, in short: their long forms are commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora import simulate
from fedlora.experiments.benchmarks import kills, soak

ROOT = Path(__file__).resolve().parents[1]
CONFIG: dict[str, Any] = {
    **kills.CONFIG,
    "run": {"name": "kills", "seed": 1, "rounds": 6},
    "simulation": {"workers": 1},
}
KINDS = {kind: 0.2 if kind in ("late", "killed", "nan") else 0.4 / (len(soak.KINDS) - 3) for kind in soak.KINDS}
"""So that in a few rounds each of the three comes."""


@pytest.mark.slow
@pytest.mark.usefixtures("cached", "bare")
def test_killed_drivers_and_workers_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start has a Ray of its own; the reference runs in this process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    simulate({**CONFIG, "simulation": {"workers": 0}}, output=tmp_path / "whole")
    victim = kills.Victim(CONFIG, tmp_path / "killed")
    done = kills.attack(victim, ["worker", "driver"], 3.0, np.random.default_rng(0))
    assert [kill["killed"] for kill in done] == ["worker", "driver"]
    assert victim.starts == 2
    assert kills.content(tmp_path / "killed") == kills.content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_nothing_is_lost_whatever_fails(tmp_path: Path) -> None:
    """In a process of its own, whose workers know what is to fail."""
    code = (
        "import json, sys; from fedlora.experiments.benchmarks.soak import soak; "
        f"print(json.dumps(soak(4, 14, 10.0, {KINDS!r})))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert set(found["faults"]) >= {"late", "killed", "nan"}
    assert found["resumed"] == 1
    assert found["workers_started"] > 2


def test_checks_of_the_soak_see_what_is_wrong() -> None:
    faults = {"1/0": "nan", "1/1": "killed", "2/0": "late"}
    assert soak.check_left_out(faults, {"1/0": "reply", "2/0": "late", "2/1": "no_reply"}) == ([], 1)
    for found, place in (
        ({"2/0": "late"}, "1/0: None, not reply"),
        ({"1/0": "failed", "2/0": "late"}, "1/0: failed, not reply"),
        ({"1/0": "reply", "1/1": "worker_died", "2/0": "late"}, "1/1: worker_died, not None"),
        ({"1/0": "reply", "1/2": "late", "2/0": "late"}, "1/2: late, not None"),
    ):
        assert soak.check_left_out(faults, found)[0] == [place]


def test_growth_is_told_from_steps_and_noise() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1e5, 180)
    step = np.where(np.arange(180) < 30, 0, 5e7)
    flat, leaking = (5e8 + noise + step).astype(int), (5e8 + noise + 150_000 * np.arange(180)).astype(int)
    assert soak.check_growth({"driver": soak.slope(flat[31:].tolist())}) == []
    assert soak.slope(leaking.tolist()) == pytest.approx(150_000, rel=0.05)
    assert soak.check_growth({"worker": soak.slope(leaking.tolist())}) != []


def test_a_fifth_of_the_clients_fail_in_every_way() -> None:
    faults = soak.draw_faults(200, 50, 17)
    assert len(faults) == pytest.approx(2000, rel=0.1)
    assert set(faults.values()) == set(soak.KINDS)
    late = [int(place.partition("/")[0]) for place, kind in faults.items() if kind == "late"]
    assert len(late) == len(set(late))
    assert 1 not in late
    # The memory of workers shows where these live long.
    ending = [int(place.partition("/")[0]) for place, kind in faults.items() if kind in soak.ENDING]
    assert max(ending) <= 100
    assert len(ending) > 20


def test_memory_is_looked_at_where_no_process_starts() -> None:
    memory = soak.Memory()
    memory.driver = [*range(0, 5000, 50), *[10**6 + 7 * n for n in range(100)]]
    memory.workers = {1: [(n, 10**6 * n) for n in range(1, 90)], 2: [(n, 3 * n) for n in range(101, 201)]}
    memory.workers[3] = [(n, 5 * n) for n in range(101, 201)]
    assert memory.growth(140) == {"driver": 7.0, "worker": 5.0}
    del memory.workers[2], memory.workers[3]
    assert memory.growth(140)["worker"] == float("inf")  # nothing was seen
