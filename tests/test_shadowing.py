"""An ordinary install, used where a user's own files are called strategies, clients and experiments."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from tests.command import IN_TURN
from tests.tiny import save_llama

ROOT = Path(__file__).parents[1]
OURS = ("strategies", "clients", "experiments")
FILES = {
    "strategies.py": "from flwr.serverapp.strategy import FedAvg\nclass Mine(FedAvg): ...\n",
    "clients/__init__.py": "",
    "clients/client_app.py": "from fedlora.clients.client_app import app\n",
    "experiments/__init__.py": "raise ImportError('the user\\'s experiments are not for fedlora')\n",
    "run.py": """
import json, sys
import strategies                      # the user's own, before fedlora
from fedlora import simulate
import fedlora.strategies
import clients.client_app              # and after it
if __name__ == "__main__":
    for workers in (0, 1):             # in this process, and on a Ray of its own
        result = simulate(
            sys.argv[1], {"simulation.workers": workers}, output=f"runs/{workers}",
            strategy=strategies.Mine(), client_app="clients.client_app:app",
        )
        print(json.dumps({
            "theirs": [strategies.__file__, clients.__file__],
            "ours": [fedlora.__file__, fedlora.strategies.__file__],
            "rounds": result.summary["rounds"],
        }))
""",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip installed this tree, without links back to it."""
    place = tmp_path_factory.mktemp("install")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "runs", "tests", "__pycache__")
    shutil.copytree(ROOT, place / "tree", symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", place / "site", place / "tree"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(place / "tree")
    return place / "site"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's working directory."""
    place = tmp_path_factory.mktemp("user")
    for name, text in FILES.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    save_llama(place / "model")
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": f"w4 w5 w{word}"}) + "\n" for word in range(6, 26)))
    data = {"name": "texts.jsonl", "test": "texts.jsonl", "partition": {"clients": 2}}
    config = {
        "run": {"name": "mine", "rounds": 1},
        "model": {"name": str(place / "model"), "task": "causal-lm", "max_length": 8},
        "data": data,
        "method": {"name": "fedit", "rank": 2},
        "client": {"batch_size": 4, "local_steps": 1},
        "simulation": {"workers": 0},
    }
    (place / "mine.toml").write_text(tomli_w.dumps(config))
    return place


def python(site: Path, here: Path, *arguments: object) -> str:
    """Run Python in the user's directory; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(site), "FEDLORA_CACHE": str(here / "cache")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nothing_of_ours_lies_beside_the_package(site: Path) -> None:
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} <= {"fedlora", "bin"}
    # All of it: what lacks would be taken from an editable install, where there is one.
    ours = {path.relative_to(ROOT) for name in OURS for path in (ROOT / name).rglob("*.py")}
    ours |= {path.relative_to(ROOT / "fedlora") for path in (ROOT / "fedlora").rglob("*.py")}
    assert {path.relative_to(site / "fedlora") for path in (site / "fedlora").rglob("*.py")} == ours
    assert (site / "fedlora" / "experiments" / "quickstart.toml").is_file()


def test_the_commands_find_their_own_modules(site: Path, here: Path) -> None:
    commands = [["methods"], ["run", "mine.toml", "--output", "runs/command"]]
    # With -c the working directory is before everything else on the path.
    assert "ffa-lora" in python(site, here, "-c", IN_TURN, json.dumps(commands))
    assert json.loads((here / "runs" / "command" / "summary.json").read_text())["rounds"] == 1


def test_a_users_modules_stay_the_users(site: Path, here: Path) -> None:
    printed = python(site, here, "run.py", "mine.toml").splitlines()
    both = [json.loads(line) for line in printed if line.startswith("{")]
    package = site / "fedlora"
    assert both == 2 * [
        {
            "theirs": [str(here / "strategies.py"), str(here / "clients" / "__init__.py")],
            "ours": [str(package / "__init__.py"), str(package / "strategies" / "__init__.py")],
            "rounds": 1,
        }
    ]


def test_nothing_imports_them_under_names_of_their_own() -> None:
    """A second copy of a module has other classes, which no ``isinstance`` knows."""
    for package in ("fedlora", "tests", *OURS):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not {name.split(".")[0] for name in names} & set(OURS), f"{path}:{node.lineno}"
