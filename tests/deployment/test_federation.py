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
from tests.command import fedlora
from tests.deployment.federation import NAME, Federation, until


def config_of(examples: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Make a run's config for nodes."""
    content: dict[str, dict[str, Any]] = {
        "run": {"name": name, "rounds": 3, "seed": 4},
        "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 32},
        "data": {"name": "nodes", "test": str(examples / "test.csv"), "partition": {"clients": 3}},
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
    path, folder = federation.folder / f"{name}.run.toml", federation.folder / "runs" / name
    path.write_text(tomli_w.dumps(content), encoding="utf-8")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FLWR_HOME", str(federation.home))
        done = fedlora("run", path, "--on", NAME, "--output", folder)
    assert done.code == 0, done.out + done.err + federation.output("server")
    return folder


@pytest.fixture(scope="module")
def simulation(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a simulation of the plain run; all.csv says which client holds which row."""
    content = plain(examples)
    content["data"] |= {"name": str(examples / "all.csv"), "partition": {"kind": "natural", "column": "owner"}}
    content["simulation"] = {"workers": 0}
    return simulate(content, output=tmp_path_factory.mktemp("simulation") / "plain").folder


def plain(examples: Path) -> dict[str, Any]:
    """Make the config of a run without privacy."""
    return {**short(examples, "plain"), "privacy": {"mode": "none"}}


def short(examples: Path, name: str) -> dict[str, Any]:
    """Make the config of two rounds on two layers."""
    return config_of(examples, name, run={"rounds": 2}, model={"num_hidden_layers": 2})


def column(folder: Path, *names: str) -> list[tuple[str, ...]]:
    with (folder / "communication.csv").open(encoding="utf-8") as stream:
        return [tuple(row[name] for name in names) for row in csv.DictReader(stream)]


WHO_AND_PAYLOAD = ("round", "client", "direction", "payload_bytes", "formula_bytes")


def test_private_run_on_three_owners_files(federation: Federation, examples: Path, simulation: Path) -> None:
    federation.empty_ledgers()
    federation.set_policy(max_epsilon=8.0, delta=1e-3)
    there = run_on(federation, short(examples, "private"))
    # The payload does not depend on privacy.
    assert column(there, *WHO_AND_PAYLOAD) == column(simulation, *WHO_AND_PAYLOAD)
    assert len(column(there, "round")) == 2 * 3 * 2 + 3
    summary = json.loads((there / "summary.json").read_text())
    assert 7.0 < summary["epsilon"]["max"] <= 8.0
    lines = [json.loads(line) for line in (there / "rounds.jsonl").read_text().splitlines()]
    assert [line["failed"] for line in lines] == [[], []]
    assert tomllib.loads((there / "config.toml").read_text())["data"]["name"] == "nodes"
    # Only a simulation knows who holds what.
    files = {path.name for path in simulation.iterdir()} - {"partition.png", "partition.csv"}
    assert {path.name for path in there.iterdir()} >= files


def test_without_privacy_the_adapter_is_the_simulations(
    federation: Federation, examples: Path, simulation: Path
) -> None:
    federation.set_policy(allow_non_private=True)
    there = run_on(federation, plain(examples))
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (simulation, there))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 1e-6
    # Of which something was learned: at the start dW is 0.
    assert max(float(array.abs().max()) for name, array in theirs.items() if "lora_B" in name) > 1e-4
    assert column(there, *WHO_AND_PAYLOAD) == column(simulation, *WHO_AND_PAYLOAD)
    first, second = (json.loads((folder / "summary.json").read_text())["final"] for folder in (simulation, there))
    assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.federation
def test_bytes_on_the_socket_are_those_of_the_messages(federation: Federation, examples: Path) -> None:
    federation.set_policy(allow_non_private=True)
    content = config_of(examples, "bytes", run={"rounds": 2}, method={"name": "ffa-lora", "rank": 128})
    path = federation.folder / "bytes.run.toml"
    path.write_text(tomli_w.dumps(content), encoding="utf-8")
    federation.start("bytes", "run", path, "--on", NAME)
    lines = federation.folder / "server" / "runs" / "bytes" / "rounds.jsonl"
    # Not the first round: the zeros with which B starts are the same in all layers, and Flower sends same arrays once.
    until(lambda: lines.exists() and "\n" in lines.read_text(), 300, "first round")
    before = federation.proxy.total
    until(lambda: lines.read_text().count("\n") == 2, 300, "second round")
    on_the_wire = federation.proxy.total - before
    assert federation.processes.pop("bytes").wait(100) == 0
    there = federation.folder / "runs" / "bytes"
    sizes = [int(size) for number, size in column(there, "round", "message_bytes") if number == "2"]
    assert len(sizes) == 6
    assert min(sizes) > 1_000_000
    assert sum(sizes) <= on_the_wire <= 1.05 * sum(sizes)
    flower = json.loads((there / "summary.json").read_text())["communication"]["flower"]
    assert flower["message_bytes"] == sum(int(size) for (size,) in column(there, "message_bytes"))
    assert flower["overhead"] == (flower["sent_bytes"] + flower["received_bytes"]) / flower["message_bytes"] - 1
