"""Every method on three real nodes, with TLS and authentication, gives what its simulation gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedlora import simulate
from fedlora.methods import methods
from tests.deployment.federation import Federation
from tests.deployment.test_federation import WHO_AND_PAYLOAD, column, config_of, run_on

pytestmark = [pytest.mark.federation, pytest.mark.timeout(900)]

ON_AN_ENCODER = [name for name, method in methods().items() if method.outputs == ("adapter",)]
"""A method whose result is a model of its own has a test with a language model: test_methods_on_nodes.py."""


def content_of(examples: Path, name: str) -> dict[str, Any]:
    content = config_of(
        examples, f"every-{name}", run={"rounds": 2}, method={"name": name, "rank": 4}, privacy={"mode": "none"}
    )
    content["client"] |= {"optimizer": "sgd", "learning_rate": 0.05, "local_steps": 3}
    return content


@pytest.mark.parametrize("name", ON_AN_ENCODER)
def test_nodes_give_what_the_simulation_gives(
    federation: Federation, examples: Path, tmp_path: Path, name: str
) -> None:
    federation.set_policy(allow_non_private=True)
    content = content_of(examples, name)
    there = run_on(federation, content)
    data = {"name": str(examples / "all.csv"), "partition": {"kind": "natural", "column": "owner"}}
    content["data"] |= data
    here = simulate({**content, "simulation": {"workers": 0}}, output=tmp_path / "simulation").folder
    assert column(there, *WHO_AND_PAYLOAD) == column(here, *WHO_AND_PAYLOAD)
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (here, there))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= 1e-5
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (here, there))
    assert first["final"] == pytest.approx(second["final"], rel=1e-4)
    assert second["communication"]["payload_bytes"] == second["communication"]["formula_bytes"]
