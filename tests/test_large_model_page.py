"""docs/tutorials/large-model.md: its config runs on a small Llama, and its tables are what shape and formulas say."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from transformers import LlamaForCausalLM

from fedlora.config import load_config
from fedlora.strategies.base import Contact, Sizes, get_strategy
from tests import tiny
from tests.bare_runs import bare_runs
from tests.chats import chat, save_chat_llama
from tests.command import fedlora
from tests.documented import NOT_RUN
from tests.pages import ROOT, commands, in_language

PAGE = "docs/tutorials/large-model.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
SHAPE: dict[str, int] = tomllib.loads((ROOT / "experiments" / "benchmarks" / "llm.toml").read_text())["shapes"][
    "llama-8b"
]
GIB = 2**30


def linear_layers() -> list[tuple[int, int]]:
    """Outputs and inputs of the linear layers of all blocks."""
    wide, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    keys = wide * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
    block = [(wide, wide), (keys, wide), (keys, wide), (wide, wide), (inner, wide), (inner, wide), (wide, inner)]
    return block * SHAPE["num_hidden_layers"]


def table(heading: str) -> dict[str, list[str]]:
    """Rows of the table below a heading, by their first cell."""
    section = TEXT.split(f"\n## {heading}")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (.+) \|$", section, re.MULTILINE)[1:]
    return {row[0]: row[1:] for row in ([cell.strip() for cell in line.split(" | ")] for line in lines)}


def test_its_parameters_and_weights_are_those_of_the_shape() -> None:
    layers = linear_layers()
    linear = sum(m * n for m, n in layers)
    embeddings = 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
    other = embeddings + (2 * SHAPE["num_hidden_layers"] + 1) * SHAPE["hidden_size"]
    assert f"{linear + other:,} parameters" in TEXT
    assert f"{linear:,} are in the linear layers" in TEXT
    # A scale of 4 bytes for each row, and for each 64 weights.
    sizes = {
        "bfloat16": 2 * linear,
        "int8": linear + 4 * sum(m for m, _ in layers),
        "nf4": linear / 2 + 4 * linear / 64,
    }
    shown = {name: cells[0] for row, cells in table("Memory").items() for name in sizes if f'"{name}"' in row}
    assert shown == {name: f"{(size + 2 * other) / GIB:.1f}" for name, size in sizes.items()}


def test_its_bytes_are_those_of_the_formulas() -> None:
    rows = table("Bytes")
    assert len(rows) == 4
    for row, cells in rows.items():
        name, rank = re.fullmatch(r"`(.+)`, (\d+)", row).groups()  # type: ignore[union-attr]
        content: dict[str, Any] = {
            "model": {"name": "x", "task": "causal-lm"},
            "data": {"name": "x.jsonl", "partition": {"clients": 2}},
            "method": {"name": name, "rank": int(rank)},
        }
        strategy = get_strategy(name)(load_config(content))
        sizes = Sizes(linear_layers(), int(rank), 0)
        payload = strategy.payload(sizes, Contact(round=1, client=0, since=None, replied={}))
        assert cells == [f"{4 * numbers / 1e6:.1f}" for numbers in (payload.up, payload.down, payload.initial)]
        if row == "`fed-sb`, 64":
            assert f"4 × {payload.up:,} × 4 bytes, or {16 * payload.up / 1e6:.0f} MB" in TEXT


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_its_config_and_commands_run_on_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    save_chat_llama(tmp_path / "small")
    # 4-bit blocks have 64 weights.
    LlamaForCausalLM(tiny.llama_config(hidden_size=64, intermediate_size=128)).save_pretrained(tmp_path / "small")
    (block,) = in_language("toml", PAGE)
    content = tomllib.loads(block.text)
    folder = content["model"]["name"]
    content["model"] |= {"name": str(tmp_path / "small"), "max_length": 24}
    content["method"]["rank"] = 4
    content["privacy"]["target_delta"] = 1e-2
    content["run"]["rounds"] = 1
    content["client"]["local_steps"] = 2
    content["simulation"] = {"workers": 0}
    (tmp_path / "large.toml").write_text(tomli_w.dumps(content))
    rng = np.random.default_rng(0)
    rows = [
        {"messages": chat(*(f"w{a} w{b}" for a, b in rng.integers(9, 50, (2, 2)))), "owner": f"owner-{number % 2}"}
        for number in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = []
    with bare_runs():
        for command in commands(PAGE):
            if not any(re.search(pattern, str(command)) for pattern in NOT_RUN):
                words = [word.replace(folder, str(tmp_path / "small")) for word in command.words]
                done = fedlora(*words[1:])
                assert done.code == 0, done.err
                ran.append(words[1])
    assert ran == ["run", "show", "export", "export", "digest"]
    summary = json.loads((tmp_path / "runs" / "large" / "summary.json").read_text())
    assert summary["epsilon"]["max"] <= content["privacy"]["target_epsilon"]
    assert (tmp_path / "models" / "large" / "config.json").is_file()
