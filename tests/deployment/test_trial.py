"""``fedlora trial``: one command from nothing to a run on real nodes, and nothing left but what was asked for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.node.config import load_node
from fedlora.node.status import node_status
from tests.deployment.federation import left_of, until

pytestmark = [pytest.mark.federation, pytest.mark.timeout(900), pytest.mark.usefixtures("cached")]

ROOT = Path(__file__).parents[2]
SMALL = (
    "--nodes",
    "2",
    "--set",
    "run.rounds=1",
    "--set",
    "model.num_hidden_layers=2",
    "--set",
    "data.max_examples=120",
)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("FLWR_HOME", None)
    command = [sys.executable, "-m", "fedlora.cli", "trial", *SMALL, *arguments]
    with (folder / "out").open("w") as stream:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stream, stderr=stream, text=True,
            # Background jobs of a shell ignore it, and so would this one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip


def test_a_trial_runs_and_what_it_keeps_is_ended_by_its_own_line(tmp_path: Path) -> None:
    code = start(tmp_path, "--keep").wait(600)
    out = (tmp_path / "out").read_text()
    try:
        assert code == 0, out
        summary = json.loads((tmp_path / "trial" / "run" / "summary.json").read_text())
        assert (summary["rounds"], summary["clients"]) == (1, 2)
        for name in ("node-1", "node-2"):
            found = node_status(load_node(tmp_path / "trial" / name / "node.toml"))
            assert [(run.name, run.rounds) for run in found.runs] == [("trial", 1)]
            assert 0 < found.epsilon <= summary["epsilon"]["max"] * (1 + 1e-9)
            assert f"{name}: epsilon {found.epsilon:.4g} spent" in out
        # The tutorial tells of the same steps.
        told = (ROOT / "docs" / "tutorials" / "real-nodes.md").read_text()
        steps = re.findall(r"^\d\. (.+)$", out, re.MULTILINE)
        assert len(steps) == 7
        assert all(step in told for step in steps[:6])
        running = left_of(tmp_path / "trial")
        assert sum("fedlora.cli node" in line for line in running) == 2
    finally:
        (line,) = re.findall(r"^    (kill [\d ]+)$", out, re.MULTILINE)
        subprocess.run(line.split(), check=True)
        until(lambda: not left_of(tmp_path / "trial"), 120, "end of what was kept")


def test_ctrl_c_in_a_run_ends_everything(tmp_path: Path) -> None:
    process = start(tmp_path, "--set", "run.rounds=50")
    rounds = tmp_path / "trial" / "coordinator" / "state" / "runs" / "trial" / "rounds.jsonl"
    until(lambda: process.poll() is not None or (rounds.exists() and "\n" in rounds.read_text()), 400, "first round")
    assert process.poll() is None, (tmp_path / "out").read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait(200) == 1
    out = (tmp_path / "out").read_text()
    assert out.splitlines()[-1] == "fedlora: stopped"
    assert "The nodes and the server are stopped" in out
    assert left_of(tmp_path / "trial") == []
