"""Runs on real nodes: the same result and the same bytes as in simulation."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors.torch import load_file

from fedlora import simulate
from tests.deployment.federation import NAME, Federation

SIMULATED = {"partition": {"kind": "natural", "column": "owner"}}


def config_of(examples: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Make a run's config for nodes."""
    content: dict[str, dict[str, Any]] = {
        "run": {"name": name, "rounds": 3, "seed": 4},
        "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 32},
        "data": {"name": "nodes", "test": str(examples / "test.csv")},
        "method": {"name": "fed-sb"},
        "client": {"optimizer": "sgd", "batch_size": 10, "local_steps": 2, "learning_rate": 0.5},
        "privacy": {"mode": "example", "target_epsilon": 8.0, "target_delta": 1e-3},
        "server": {"timeout": 120.0},
    }
    for section, values in sections.items():
        content[section] = {**content[section], **values}
    return content


def run_on(federation: Federation, content: dict[str, Any]) -> Path:
    """Run a config with the command; return the run folder that came back."""
    name = content["run"]["name"]
    path = federation.folder / f"{name}.run.toml"
    path.write_text(tomli_w.dumps(content), encoding="utf-8")
    done = federation.fedlora("run", path, "--on", NAME)
    assert done.returncode == 0, done.stdout + done.stderr + federation.output("server")
    return federation.folder / "runs" / name


def simulated(examples: Path, content: dict[str, Any], output: Path) -> Path:
    """Simulate what :func:`run_on` runs; all.csv says which client holds which row."""
    data = {**content["data"], **SIMULATED, "name": str(examples / "all.csv")}
    return simulate({**content, "data": data}, output=output).folder


def column(folder: Path, *names: str) -> list[tuple[str, ...]]:
    with (folder / "communication.csv").open(encoding="utf-8") as stream:
        return [tuple(row[name] for name in names) for row in csv.DictReader(stream)]


WHO_AND_PAYLOAD = ("round", "client", "direction", "payload_bytes", "formula_bytes")


@pytest.mark.timeout(240)
def test_private_run_on_three_owners_files(
    federation: Federation, examples: Path, tmp_path: Path, ray_here: None
) -> None:
    content = config_of(examples, "private")
    federation.set_policy(max_epsilon=100.0, delta=1e-3)
    there = run_on(federation, content)
    here = simulated(examples, content, tmp_path / "here")
    assert column(there, *WHO_AND_PAYLOAD) == column(here, *WHO_AND_PAYLOAD)
    assert len(column(there, "round")) == 3 * 3 * 2 + 3
    summary = json.loads((there / "summary.json").read_text())
    ours = json.loads((here / "summary.json").read_text())
    assert summary["epsilon"]["max"] == pytest.approx(ours["epsilon"]["max"], rel=1e-9)
    # The noise is the nodes' own.
    assert load_file(there / "adapter" / "adapter_model.safetensors").keys()
    assert difference(there, here) > 1e-4
    lines = [json.loads(line) for line in (there / "rounds.jsonl").read_text().splitlines()]
    assert [line["failed"] for line in lines] == [[], [], []]
    assert tomllib.loads((there / "config.toml").read_text())["data"]["name"] == "nodes"


@pytest.mark.timeout(240)
def test_without_privacy_the_adapter_is_the_simulations(
    federation: Federation, examples: Path, tmp_path: Path, ray_here: None
) -> None:
    content = config_of(examples, "plain", privacy={"mode": "none"})
    content["privacy"] = {"mode": "none"}
    federation.set_policy(allow_non_private=True)
    there = run_on(federation, content)
    here = simulated(examples, content, tmp_path / "here")
    assert difference(there, here) <= 1e-6
    assert column(there, *WHO_AND_PAYLOAD) == column(here, *WHO_AND_PAYLOAD)
    assert moved(there) > 1e-3


@pytest.mark.timeout(240)
def test_bytes_on_the_socket_are_those_of_the_messages(federation: Federation, examples: Path) -> None:
    content = config_of(examples, "bytes", run={"rounds": 1}, method={"name": "ffa-lora", "rank": 128})
    federation.set_policy(max_epsilon=100.0, delta=1e-3)
    before = federation.proxy.total
    there = run_on(federation, content)
    on_the_wire = federation.proxy.total - before
    sizes = [int(size) for (size,) in column(there, "message_bytes")]
    assert len(sizes) == 9
    assert min(sizes) > 1_000_000
    assert sum(sizes) <= on_the_wire <= 1.05 * sum(sizes)
    flower = json.loads((there / "summary.json").read_text())["communication"]["flower"]
    assert -0.01 < flower["overhead"] < 0.05
    assert flower["sent_bytes"] + flower["received_bytes"] <= on_the_wire


def difference(first: Path, second: Path) -> float:
    """Largest difference between two runs' adapters."""
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def moved(folder: Path) -> float:
    """Largest absolute number in a run's adapter."""
    arrays = load_file(folder / "adapter" / "adapter_model.safetensors")
    return max(float(array.abs().max()) for name, array in arrays.items() if "lora_B" in name)
