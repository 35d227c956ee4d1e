"""Secure sums on three real nodes over TLS: the result and the bytes of the simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedlora import simulate
from tests.deployment.federation import Federation
from tests.deployment.test_federation import WHO_AND_PAYLOAD, column, plain, run_on

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
