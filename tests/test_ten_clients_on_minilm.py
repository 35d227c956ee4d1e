"""Two rounds of ten clients on the real MiniLM's first layers: every method, and ten of PEFT's types, with privacy and
without.

What comes out loads in stock PEFT, whose model has the loss on the test set that the run measured.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from fedlora import simulate
from fedlora.config import load_config
from fedlora.data.tokens import prepare_data
from fedlora.methods import methods
from fedlora.models import pretrained_source

LAYERS = 2  # more of them add seconds, and nothing that the second does not

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cached", "bare")]

CONFIG: dict[str, Any] = {
    "run": {"rounds": 2},
    "model": {"name": "asset:minilm-l6", "max_length": 16, "num_hidden_layers": LAYERS},
    "data": {
        "name": "asset:rotten-tomatoes",
        "max_examples": 100,
        "max_test_examples": 20,
        "partition": {"kind": "iid", "clients": 10},
    },
    "client": {"batch_size": 4, "local_steps": 1},
    "simulation": {"workers": 0},
}
NOISE = {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}
PEFT_TYPES = ("VERA", "RANDLORA", "UNILORA", "SHIRA", "MISS", "FOURIERFT", "LOHA", "LOKR", "IA3", "LORA")
# Experts are of language models.
METHODS = [name for name in methods() if name not in ("flexmore", "peft")]
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"name": name, "rank": 4} for name in METHODS},
    "ravan by head": {"name": "ravan", "rank": 4, "ranks": [4, 4, 4, 4, 8, 8, 8, 16, 16, 16]},
    **{f"peft {kind}": {"name": "peft", "rank": 4, "peft_type": kind} for kind in PEFT_TYPES},
    "peft LORA": {"name": "peft", "rank": 4, "peft_type": "LORA", "peft": {"use_dora": True}},
}


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_two_rounds(name: str, private: bool, tmp_path: Path) -> None:
    method = methods()[OPTIONS[name]["name"]]
    content = CONFIG | {"method": OPTIONS[name]} | ({"privacy": NOISE} if private else {})
    personal = method.personalised(load_config(content))
    if personal:
        content = content | {
            "data": CONFIG["data"] | {"client_test": 0.2},
            "server": {"fraction_evaluate": 1.0, "evaluate_not_covered": True},
        }
    result = simulate(content, output=tmp_path / "run")
    summary = result.summary
    assert (summary["rounds"], summary["clients"]) == (2, 10)
    assert (summary["epsilon"] is not None) == private
    with (tmp_path / "run" / "communication.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    sent = [row for row in rows if row["direction"] in ("initial", "down", "up")]
    assert sum(row["direction"] == "up" for row in sent) == 20
    assert all(row["payload_bytes"] == row["formula_bytes"] for row in sent)
    if not personal:  # of clients' own models the server has none
        assert stock_loss(content, tmp_path / "run" / "adapter") == pytest.approx(summary["final"]["loss"], abs=1e-4)


@torch.no_grad()
def stock_loss(content: dict[str, Any], adapter: Path) -> float:
    """Mean loss on the test set of the stock model, with the adapter as stock PEFT loads it."""
    config = load_config(content)
    shape = {"num_labels": 2, "num_hidden_layers": LAYERS}
    base = AutoModelForSequenceClassification.from_pretrained(pretrained_source(config), **shape)
    model: Any = PeftModel.from_pretrained(base, str(adapter)).eval()
    table = prepare_data(config).test
    batch = table.batch(range(len(table)))
    labels = batch.pop("labels")
    return float(cross_entropy(model(**batch).logits, labels))
