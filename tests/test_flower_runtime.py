"""The same app on Flower's own simulation runtime."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from fedlora import simulate
from fedlora.errors import RunError
from fedlora.simulation.local_grid import LocalGrid
from fedlora.strategies.server_app import free_folder, main

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
    # A Ray that died on this machine leaves its address, which Flower's Ray would try. Sockets want short paths.
    ray_folder = tempfile.mkdtemp(prefix="fedlora-", dir="/tmp")
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": ray_folder,
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
    shutil.rmtree(ray_folder, ignore_errors=True)


def payloads(folder: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
    with (folder / "communication.csv").open(encoding="utf-8") as stream:
        return {
            (row["round"], row["client"], row["direction"]): (row["payload_bytes"], row["formula_bytes"])
            for row in csv.DictReader(stream)
        }


# Flower starts a SuperLink and a Ray of its own, which takes many minutes on a busy machine.
@pytest.mark.timeout(1800)
def test_same_bytes_a_round_on_flowers_own_runtime(flower: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG, encoding="utf-8")
    command = [
        BIN / "flwr", "run", ROOT, "local", "--stream",
        "--federation-config", "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=1",
        "--run-config", f"config='{config}' output='{tmp_path / 'on-flower'}'",
    ]  # fmt: skip
    for _ in range(5):
        done = subprocess.run(command, env=flower, capture_output=True, text=True, timeout=1700)
        # Flower gives its own SuperLink 15 s, which a busy machine may need for its imports.
        if "Failed to start local SuperLink within" not in done.stdout + done.stderr:
            break
    assert (tmp_path / "on-flower" / "summary.json").exists(), done.stdout + done.stderr
    ours = simulate(config, {"simulation.workers": 0}, output=tmp_path / "here")
    theirs = payloads(tmp_path / "on-flower")
    assert theirs == payloads(ours.folder)
    assert len(theirs) == 2 * 3 * 2 + 3
    assert all(payload == formula for payload, formula in theirs.values())


def documented_command() -> str:
    """Return the guide's lines that run the app on Flower's simulation, as one script."""
    guide = (ROOT / "docs" / "guides" / "gpus.md").read_text(encoding="utf-8")
    found = re.search(r"^    export PATH=.*\n    flwr run .*$", guide, re.MULTILINE)
    assert found is not None
    return found[0]


def run_documented(flower: dict[str, str], folder: Path, change: dict[str, str]) -> str:
    """Run the guide's command in a folder that has the app's files, with parts of it replaced."""
    for name in ("fedlora", "strategies", "clients", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    config = folder / "experiments" / "quickstart.toml"
    config.write_text(config.read_text(encoding="utf-8").replace("rounds = 8", "rounds = 1"), encoding="utf-8")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(BIN)
    script = documented_command()
    for part, other in change.items():
        assert part in script
        script = script.replace(part, other)
    plain = {name: value for name, value in flower.items() if name != "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=plain, capture_output=True, text=True, timeout=800)
    return done.stdout + done.stderr


@pytest.mark.federation
@pytest.mark.timeout(900)
def test_the_documented_command_refuses_fewer_nodes_than_clients(flower: dict[str, str], tmp_path: Path) -> None:
    told = run_documented(flower, tmp_path, {"num-supernodes=10": "num-supernodes=2"})
    assert "data.partition.clients = 10: 2 nodes are online" in told
    assert "num-supernodes=10" in told
    assert not (tmp_path / "runs" / "quickstart").exists()
    assert not any(tmp_path.rglob("torch")), "an environment of its own was built"


@pytest.mark.federation
@pytest.mark.timeout(900)
def test_the_documented_command_runs_after_the_quickstart(flower: dict[str, str], tmp_path: Path) -> None:
    done = tmp_path / "runs" / "quickstart"
    done.mkdir(parents=True)
    told = run_documented(flower, tmp_path, {})
    summary = tmp_path / "runs" / "quickstart-2" / "summary.json"
    assert summary.exists(), told
    assert not any(done.iterdir())
    clients = {client for _, client, _ in payloads(summary.parent)}
    assert clients == {str(client) for client in range(10)}


@pytest.mark.usefixtures("cached")
def test_the_server_refuses_fewer_nodes_than_clients(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG, encoding="utf-8")
    output = tmp_path / "run"
    values = {"config": str(config), "output": str(output)}
    grid = LocalGrid("fedlora.clients.client_app:app", 2, run_config=values)
    with pytest.raises(RunError, match=r"clients = 3: 2 nodes are online.*num-supernodes=3$"):
        main(grid, Context(1, 1, {}, RecordDict(), values))
    assert not output.exists()


def test_a_run_without_a_name_for_its_folder_takes_a_free_one(tmp_path: Path) -> None:
    assert free_folder(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").symlink_to("nowhere")
    assert free_folder(tmp_path / "run") == tmp_path / "run-3"


def test_flowers_app_holds_code_and_configs_only(flower: dict[str, str], tmp_path: Path) -> None:
    subprocess.run([BIN / "flwr", "build", "--app", ROOT], cwd=tmp_path, env=flower, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.fab"))) as app:
        names = [name for name in app.namelist() if not name.startswith(".info")]
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders <= {"fedlora", "strategies", "clients", "experiments"}
    assert all(name.endswith(".toml") for name in names if name.startswith("experiments/"))
    assert "experiments/quickstart.toml" in names
    assert {Path(name).suffix for name in names} <= {".py", ".toml", ".md", ""}
