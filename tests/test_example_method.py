"""The example package of docs/: a method from outside the repository is installed, and works by name."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import fedlora
from fedlora.methods import forget_methods
from fedlora.strategies.federation import Progress
from tests.command import fedlora as command
from tests.tiny import save_llama

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package in a folder of its own."""
    folder = tmp_path_factory.mktemp("example")
    # The build writes beside the sources.
    shutil.copytree(ROOT / "docs" / "example_method", folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(folder / "site"), str(folder / "source")], check=True)
    return folder / "site"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of two clients, one of which has three times the other's examples."""
    folder = tmp_path_factory.mktemp("config")
    save_llama(folder / "model")
    for split, count in (("train", 16), ("test", 4)):
        rows = [{"text": f"w4 w{5 + n} w6 w7", "owner": "large" if n % 4 else "small"} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "run": {"rounds": 2},
        "model": {"name": str(folder / "model"), "task": "causal-lm", "max_length": 8},
        "data": {
            "name": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "partition": {"kind": "natural", "column": "owner"},
        },
        "method": {"name": "tempered-lora", "rank": 2, "weight_power": 0.0},
        "client": {"local_steps": 1, "batch_size": 4},
        "simulation": {"workers": 0},
    }
    (folder / "run.toml").write_text(tomli_w.dumps(content))
    return folder / "run.toml"


def stop(line: dict[str, Any]) -> None:
    """End a run after its first round."""
    raise KeyboardInterrupt


def done(*arguments: object, code: int = 0) -> str:
    """Run ``fedlora`` with its exit code checked; return what it printed."""
    found = command(*arguments)
    assert found.code == code, found.err
    return found.out + found.err


def adapter(run: Path) -> bytes:
    """Return the weights that a run left."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_method_of_another_package_runs_resumes_and_reports_by_name(
    installed: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped, other = (tmp_path / name for name in ("whole", "stopped", "other"))
    with monkeypatch.context() as with_package:
        with_package.syspath_prepend(str(installed))
        forget_methods()
        told = {row["name"]: row for row in json.loads(done("methods", "--json"))}
        assert told["tempered-lora"]["options"] == ["weight_power"]
        assert "method.name = tempered-lora" in done("config", "method.weight_power")

        done("run", config, "--output", whole)
        with pytest.raises(KeyboardInterrupt):
            fedlora.simulate(config, output=stopped, progress=Progress(on_round=stop))
        done("run", config, "--output", stopped, "--resume")
        assert adapter(stopped) == adapter(whole)
        summary = json.loads((whole / "summary.json").read_text())
        assert summary["method"] == "tempered-lora"
        assert summary["communication"]["payload_bytes"] == summary["communication"]["formula_bytes"] > 0

        # Its own option counts, in a config that a run left too: other weights make another mean.
        done("run", whole / "config.toml", "--set", "method.weight_power=1.0", "--output", other)
        assert adapter(other) != adapter(whole)
        done("report", whole, other, "--output", tmp_path / "report")
        with (tmp_path / "report" / "report" / "groups.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert {row["method"] for row in rows} == {"tempered-lora"}
        assert {float(row["method.weight_power"]) for row in rows} == {0.0, 1.0}

    # Without the package the run cannot be repeated, but its results can be read.
    monkeypatch.delitem(sys.modules, "fedlora_tempered")
    forget_methods()
    assert "method.name = 'tempered-lora'" in done("run", whole / "config.toml", "--output", tmp_path / "no", code=2)
    done("report", whole, other, "--output", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "report.html").exists()
    fedlora.load(whole)
