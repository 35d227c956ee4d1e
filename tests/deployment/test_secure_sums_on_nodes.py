"""Secure sums on three real nodes over TLS: the result and the bytes of the simulation, and noise that nodes share."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.rdp import RdpAccountant
from safetensors.torch import load_file

from fedlora import simulate
from fedlora.node.config import load_node
from fedlora.node.status import node_status
from tests.command import fedlora
from tests.deployment.federation import NAME, Federation
from tests.deployment.test_federation import WHO_AND_PAYLOAD, column, plain, run_on, short

pytestmark = pytest.mark.federation


def simulated(content: dict[str, Any], examples: Path, output: Path) -> Path:
    """Run the config on the same examples in this process."""
    data = {**content["data"], "name": str(examples / "all.csv"), "partition": {"kind": "natural", "column": "owner"}}
    return simulate({**content, "data": data, "simulation": {"workers": 0}}, output=output).folder


def test_three_nodes_give_the_simulations_sum(federation: Federation, examples: Path, tmp_path: Path) -> None:
    federation.set_policy(allow_non_private=True)
    content = plain(examples)
    content["run"]["name"] = "secure"
    content["server"] = {**content["server"], "secure_aggregation": True}
    there, here = run_on(federation, content), simulated(content, examples, tmp_path / "secure")
    lines = [json.loads(line) for line in (there / "rounds.jsonl").read_text().splitlines()]
    assert [(line["counted"], line["failed"], line["train_loss"]) for line in lines] == [(True, [], None)] * 2
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (here, there))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 1e-6
    assert max(float(array.abs().max()) for name, array in theirs.items() if "lora_B" in name) > 1e-4
    assert column(there, *WHO_AND_PAYLOAD) == column(here, *WHO_AND_PAYLOAD)
    assert len(column(there, "round")) == 2 * 3 * 8 + 3
    # And both are the sum that the server takes itself.
    without = simulated({**content, "server": {"timeout": 120.0}}, examples, tmp_path / "plain")
    theirs = load_file(without / "adapter" / "adapter_model.safetensors")
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 1e-5


SIGMA, NORM, DELTA = 1.5, 0.5, 1e-3
ROUNDS = 2


def composed(noise_multiplier: float, releases: int) -> float:
    """Epsilon of Gaussian releases without sampling, by dp-accounting."""
    accountant = RdpAccountant()
    accountant.compose(GaussianDpEvent(noise_multiplier), releases)
    return float(accountant.get_epsilon(DELTA))


def test_three_nodes_share_the_central_noise(
    federation: Federation, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With or without an example an update differs by two clipping norms at most: half the noise multiplier.
    owners = composed(SIGMA / 2, ROUNDS)
    federation.empty_ledgers()
    federation.set_policy(max_epsilon=1.05 * owners, delta=DELTA, allow_distributed_noise=True)
    content = short(examples, "distributed")
    content |= {
        "method": {"name": "ffa-lora", "rank": 8},
        "privacy": {
            "mode": "client", "noise": "distributed", "noise_multiplier": SIGMA, "clipping_norm": NORM,
            "target_delta": DELTA,
        },
        "server": {**content["server"], "secure_aggregation": True},
    }  # fmt: skip
    content["client"]["learning_rate"] = 1e-12  # updates of zeros: what is left is the noise
    there = run_on(federation, content)
    lines = [json.loads(line) for line in (there / "rounds.jsonl").read_text().splitlines()]
    assert [(line["counted"], line["failed"]) for line in lines] == [(True, [])] * ROUNDS
    # Two of three are promised (0.6 of them) and divide the noise; all three answered.
    extra = math.sqrt(3 / 2)
    arrays = load_file(there / "adapter" / "adapter_model.safetensors")
    noise = torch.cat([array.flatten().double() for name, array in arrays.items() if "lora_B" in name])
    deviation = math.sqrt(ROUNDS) * SIGMA * NORM * extra / 3
    assert float(noise.std()) == pytest.approx(deviation, rel=4 / math.sqrt(2 * len(noise)))
    assert abs(float(noise.mean())) < 4 * deviation / math.sqrt(len(noise))
    with (there / "privacy.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["client"] for row in rows] == ["all"] * ROUNDS
    assert [float(row["noise_multiplier"]) for row in rows] == pytest.approx([SIGMA * extra] * ROUNDS)
    expected = [composed(SIGMA * extra, releases) for releases in range(1, ROUNDS + 1)]
    assert [float(row["epsilon"]) for row in rows] == pytest.approx(expected, rel=0.02)
    for name in federation.data:
        found = node_status(load_node(federation.folder / f"{name}.toml"))
        assert (found.steps, found.epsilon) == (ROUNDS, pytest.approx(owners, rel=0.02))
    # No owner has enough left for another round.
    path = federation.folder / "beyond.run.toml"
    path.write_text(tomli_w.dumps({**content, "run": {**content["run"], "name": "beyond"}}), encoding="utf-8")
    monkeypatch.setenv("FLWR_HOME", str(federation.home))
    done = fedlora("run", path, "--on", NAME, "--output", federation.folder / "runs" / "beyond")
    assert done.code == 1
    assert "(BudgetError, code 103)" in done.err
