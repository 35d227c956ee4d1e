"""The same app on Flower's own simulation runtime."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedlora import simulate

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CONFIG = """
[run]
name = "flower"
rounds = 2
[model]
name = "asset:minilm-l6"
pooling = "mean"
max_length = 32
num_hidden_layers = 1
[data]
name = "asset:rotten-tomatoes"
max_examples = 400
max_test_examples = 50
[data.partition]
clients = 3
[method]
name = "fed-sb"
[client]
batch_size = 8
local_steps = 2
[privacy]
mode = "example"
target_epsilon = 8.0
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def flower(tmp_path: Path):
    """Environment of a Flower installation of its own; ends the local SuperLink that flwr leaves running."""
    home = tmp_path / "flower"
    home.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_SUPERLINK_CONTROL_API_PORT": str(free_port()),
    }
    yield environment
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if any("flower-superlink" in part for part in command) and any(str(home) in part for part in command):
            os.kill(int(process.name), signal.SIGTERM)


def payloads(folder: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
    with (folder / "communication.csv").open(encoding="utf-8") as stream:
        return {
            (row["round"], row["client"], row["direction"]): (row["payload_bytes"], row["formula_bytes"])
            for row in csv.DictReader(stream)
        }


def test_same_bytes_a_round_on_flowers_own_runtime(flower: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG, encoding="utf-8")
    done = subprocess.run(
        [
            BIN / "flwr", "run", ROOT, "local", "--stream",
            "--federation-config", "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2",
            "--run-config", f"config='{config}' output='{tmp_path / 'on-flower'}'",
        ],
        env=flower, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (tmp_path / "on-flower" / "summary.json").exists(), done.stdout + done.stderr
    ours = simulate(config, output=tmp_path / "on-ray")
    theirs = payloads(tmp_path / "on-flower")
    assert theirs == payloads(ours.folder)
    assert len(theirs) == 2 * 3 * 2 + 3
    assert all(payload == formula for payload, formula in theirs.values())


def test_flowers_app_holds_code_and_configs_only(flower: dict[str, str], tmp_path: Path) -> None:
    subprocess.run([BIN / "flwr", "build", "--app", ROOT], cwd=tmp_path, env=flower, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.fab"))) as app:
        names = [name for name in app.namelist() if not name.startswith(".info")]
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders <= {"fedlora", "strategies", "clients", "experiments"}
    assert all(name.endswith(".toml") for name in names if name.startswith("experiments/"))
    assert "experiments/quickstart.toml" in names
    assert {Path(name).suffix for name in names} <= {".py", ".toml", ".md", ""}
