"""A tiny model and examples on disk, and configs for audits of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertModel

from tests import tiny

OWNERS, EXAMPLES = 12, 240
Configs = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Configs:
    """Make configs of twelve clients with twenty examples each, less a tenth to test on."""
    folder = tmp_path_factory.mktemp("audited")
    torch.manual_seed(0)
    bert = BertModel(tiny.bert_config())
    with torch.no_grad():
        for parameter in bert.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    bert.save_pretrained(folder / "bert")
    tiny.save_tokenizer(folder / "bert")
    rng = np.random.default_rng(0)
    rows = [
        {
            "text": " ".join(f"w{word}" for word in rng.integers(4, 50, rng.integers(3, 9))),
            "label": number % tiny.LABELS,
            "owner": f"o{number % OWNERS}",
        }
        for number in range(EXAMPLES)
    ]
    train: Path = folder / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def content(mode: str, epsilon: float = 8.0, **sections: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, dict[str, Any]] = {
            "run": {"seed": 7, "rounds": 2},
            "model": {"name": str(folder / "bert"), "max_length": 10},
            "data": {"name": str(train), "partition": {"kind": "natural", "column": "owner"}},
            "method": {"name": "ffa-lora", "rank": 4, "target_modules": ["0.attention.self.query"]},
            "client": {"batch_size": 10, "local_steps": 2},
            "simulation": {"workers": 0},
        }
        if mode != "none":
            delta = 1e-3 if mode == "client" else 1e-5
            made["privacy"] = {"mode": mode, "target_epsilon": epsilon, "target_delta": delta}
        if mode == "client":
            made["server"] = {"sampling": "poisson", "fraction_train": 0.5}
            made["run"] |= {"rounds": 4}
        return {name: {**made.get(name, {}), **sections.get(name, {})} for name in {**made, **sections}}

    return content
