"""Procedural problems as conversations, from a small module in reasoning-gym's place."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedlora.config import load_config
from fedlora.data.sources import load_examples
from fedlora.experiments.reasoning_problems import export, problems
from tests.chats import chat

SHARED = "Is it?"
"""A question that every seed asks once."""


@pytest.fixture(autouse=True)
def gym(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dataset(name: str, *, size: int, seed: int) -> Iterator[dict[str, Any]]:
        yield {"question": f"{SHARED}\n", "answer": "No"}
        for number in range(1, size):
            yield {"question": f" {name} {seed + number}?\n", "answer": seed + number}

    module: Any = ModuleType("reasoning_gym")
    module.create_dataset = create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


def test_every_task_has_as_many_problems_of_a_seed_of_its_own() -> None:
    found = problems(["sum", "gcd"], 5, seed=10)
    assert [row["task"] for row in found] == ["sum"] * 3 + ["gcd"] * 3
    assert [row["answer"] for row in found] == ["No", "11", "12", "No", "12", "13"]
    assert found[1] == {"task": "sum", "text": "sum 11?", "answer": "11"}


def test_a_run_reads_the_splits_as_conversations(tmp_path: Path) -> None:
    export(tmp_path / "problems", ["sum", "gcd"], train=8, test=6)
    config = load_config(
        {
            "model": {"name": "asset:smollm2-135m", "task": "causal-lm"},
            "data": {"name": str(tmp_path / "problems"), "messages": "messages", "partition": {"clients": 2}},
            "method": {"name": "fedit"},
            "evaluation": {"kind": "generate"},
        }
    )
    examples = load_examples(config)
    assert examples.train is not None
    assert examples.test is not None
    assert len(examples.train) == 8
    assert examples.train["messages"][1] == chat("sum 1?", "1")
    asked = [messages[0]["content"] for messages in examples.test["messages"]]
    assert len(asked) == 4
    assert SHARED not in asked  # it is a training problem
    assert not {json.dumps(m) for m in examples.test["messages"]} & {json.dumps(m) for m in examples.train["messages"]}
