"""Tasks of BIG-bench as tables, from a small task.json in its place."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fedlora.assets import ASSETS, cache_dir
from fedlora.config import Config, load_config, unused_keys
from fedlora.data.bigbench import SPLITS, split_of
from fedlora.data.origins import load_headers, load_tables
from fedlora.data.sources import load_examples, source_identity

ROOT = Path(__file__).parents[2]
PAGES = 60


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))


def place(name: str, examples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, **about: Any) -> None:
    """Put a task.json where the asset's own would be."""
    content = json.dumps({"canary": "keep out", **about, "examples": examples}).encode()
    (member,) = ASSETS[name].files
    monkeypatch.setitem(ASSETS, name, replace(ASSETS[name], files={member: hashlib.sha256(content).hexdigest()}))
    folder = cache_dir() / "assets" / f"{name}-1.0.0"
    folder.mkdir(parents=True)
    (folder / "task.json").write_bytes(content)


def vitaminc() -> list[dict[str, Any]]:
    """Three pairs a page, one of each class; texts hold colons too."""
    return [
        {
            "input": f"Page-COLON- {page}: It is: {page}{kind} .\nClaim: It was: {page}{kind} .",
            "target_scores": {label: int(label == kind) for label in ("True", "False", "Neither")},
        }
        for page in range(PAGES)
        for kind in ("True", "False", "Neither")
    ]


def config(name: str, evaluation: dict[str, Any] | None = None, **data: Any) -> Config:
    return load_config(
        {
            "model": {"name": "asset:minilm-l6", "task": data.pop("task", "sequence-classification")},
            "data": {"name": f"asset:{name}", "partition": {"clients": 2}, **data},
            "method": {"name": "fedit"},
            "evaluation": evaluation or {},
        }
    )


def test_pairs_of_a_page_are_in_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    place("vitaminc", vitaminc(), monkeypatch)
    columns = {"text": "evidence", "text_pair": "claim", "validation": "validation"}
    examples = load_examples(config("vitaminc", **columns, partition={"kind": "natural", "column": "page"}))
    assert examples.train is not None
    assert examples.test is not None
    assert examples.validation is not None
    assert examples.label_names == ["False", "Neither", "True"]
    pages = []
    for split, table in zip(SPLITS, (examples.train, examples.validation, examples.test), strict=True):
        # Evidence and claim of a row are of one page and one class.
        found = {
            (text.split(": ")[1], pair.split(": ")[1])
            for text, pair in zip(table["text"], table["text_pair"], strict=True)
        }
        assert all(text == pair for text, pair in found)
        names = [examples.label_names[label] for label in table["label"]]
        assert all(
            text.removeprefix("It is: ").removesuffix(" .").endswith(name)
            for text, name in zip(table["text"], names, strict=True)
        )
        pages.append({int("".join(filter(str.isdigit, text))) for text in table["text"]})
        assert all(split_of(f"Page-COLON- {page}") == split for page in pages[-1])
    assert sum(map(len, pages)) == len(set.union(*pages)) == PAGES
    assert len(pages[0]) > len(pages[2]) > 0
    assert set(examples.train["partition"]) == {f"Page-COLON- {page}" for page in pages[0]}


def test_tables_are_made_once_and_keep_the_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    place("vitaminc", vitaminc(), monkeypatch)
    pair = config("vitaminc", text="evidence", text_pair="claim")
    load_examples(pair)
    files = sorted((cache_dir() / "converted").rglob("*.parquet"))
    assert [file.stem for file in files] == sorted(SPLITS)
    assert all(pq.read_schema(file).metadata[b"canary"] == b"keep out" for file in files)
    before = [file.stat().st_mtime_ns for file in files]
    load_examples(pair)
    assert [file.stat().st_mtime_ns for file in files] == before
    # Tokens of other data are not taken for these.
    known = source_identity(pair)
    place("strategyqa", [{"input": "q", "target_scores": {"Yes": 1, "No": 0}}], monkeypatch)
    assert source_identity(config("strategyqa")) != known


def test_choices_and_references(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [
        {"input": f" Is {n} even? ", "target_scores": {"No": n % 2, "Yes": 1 - n % 2}, "target": "It is."}
        for n in range(40)
    ]
    place("strategyqa", questions, monkeypatch)
    examples = load_examples(config("strategyqa", label="answer"))
    assert examples.train is not None
    assert examples.label_names == ["No", "Yes"]
    for text, label in zip(examples.train["text"], examples.train["label"], strict=True):
        assert text == text.strip()
        assert label == 1 - int(text.split()[1]) % 2
    texts = [{"input": f"name: {n}", "target": t} for n in range(40) for t in ("It is one.", ["Two.", "Three."])]
    place("e2e-nlg", texts, monkeypatch)
    examples = load_examples(config("e2e-nlg", task="causal-lm", prompt="text", answer="answer"))
    assert examples.train is not None
    assert examples.test is not None
    assert set(examples.train["answer"]) == {"It is one.", "Two."}
    # What is described in the test set is described nowhere else.
    assert not set(examples.train["prompt"]) & set(examples.test["prompt"])


@pytest.mark.parametrize("name", ["vitaminc", "strategyqa", "e2e-nlg"])
def test_columns_are_known_before_tables_are_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [{"input": f"{n}?", "target_scores": {"x": 0, "y": 1}} for n in range(40)]
    texts = [{"input": f"name: {n}", "target": f"It is {n}."} for n in range(40)]
    found = load_headers(f"asset:{name}", "data.name", set())
    place(name, {"vitaminc": vitaminc(), "strategyqa": questions, "e2e-nlg": texts}[name], monkeypatch)
    made = load_tables(f"asset:{name}", "data.name")
    assert found is not None
    assert {s: list(t.columns) for s, t in found.items()} == {s: list(t.columns) for s, t in made.items()}


def test_questions_as_conversations_are_asked_in_the_tasks_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"example_input_prefix": "\nWhat is it?:", "example_output_prefix": "\nSay:"}
    questions = [{"input": f"half of {n} ", "target_scores": {"x": 0, f"{n / 2:g}": 1}} for n in range(40)]
    place("elementary-math-qa", questions, monkeypatch, **asked)
    given = {"task": "causal-lm", "messages": "messages", "choices": "choices"}
    examples = load_examples(config("elementary-math-qa", **given, evaluation={"kind": "choice"}))
    assert examples.test is not None
    for messages, choices in zip(examples.test["messages"], examples.test["choices"], strict=True):
        question, answer = messages
        assert (question["role"], answer["role"]) == ("user", "assistant")
        number = int(question["content"].split()[5])
        assert question["content"] == f"What is it?: half of {number}\nchoice: x\nchoice: {number / 2:g}\nSay:"
        assert answer["content"] == f"{number / 2:g}"
        assert choices == ["x", f"{number / 2:g}"]
    place("strategyqa", questions, monkeypatch, append_choices_to_input=False)
    examples = load_examples(config("strategyqa", task="causal-lm", messages="messages"))
    assert examples.train is not None
    assert {messages[0]["content"] for messages in examples.train["messages"]} <= {f"half of {n}" for n in range(40)}


def test_the_shipped_config_of_chats_is_whole() -> None:
    shipped = load_config(ROOT / "experiments/chat.toml")
    assert unused_keys(shipped) == []
    assert shipped.data.templated
    assert {shipped.model.name, shipped.data.name} <= {f"asset:{name}" for name in ASSETS}
    # As its comment has it.
    given = {"data.name": "asset:social-iqa", "evaluation.kind": "choice", "data.choices": "choices"}
    chosen = load_config(ROOT / "experiments/chat.toml", given)
    assert unused_keys(chosen) == ["evaluation.max_new_tokens is not used: evaluation.kind is choice"]


def test_the_shipped_config_of_pairs_is_the_published_setting() -> None:
    shipped = load_config(ROOT / "experiments/vitaminc.toml")
    assert (shipped.run.rounds, shipped.client.local_steps, shipped.client.batch_size) == (100, 10, 64)
    assert (shipped.privacy.max_grad_norm, shipped.privacy.target_epsilon, shipped.method.rank) == (2.0, 6.0, 8)
    partition = shipped.data.partition
    assert (partition.kind, partition.alpha, partition.clients, shipped.server.fraction_train) == (
        "dirichlet",
        0.5,
        6,
        0.5,
    )
    assert {shipped.model.name, shipped.data.name} <= {f"asset:{name}" for name in ASSETS}
