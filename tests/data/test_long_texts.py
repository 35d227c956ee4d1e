"""Long examples of a language model as several rows: no token is lost or goes to others, and what is cut is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedlora.config import Config, load_config
from fedlora.data.tokens import FederatedData, TokenTable, prepare_data
from fedlora.errors import InputError
from fedlora.tasks import IGNORED
from fedlora.tasks.chat import ChatTemplate
from fedlora.tasks.long_texts import lost, split_conversations, split_row
from tests.chats import CHATML, CLOSED, MARKED, PLAIN, WITH_BOS, byte_tokenizer, chat, save_chat_llama


@given(st.integers(1, 200), st.integers(0, 40), st.integers(2, 60))
@settings(max_examples=300, deadline=None)
def test_rows_hold_every_token_and_predict_it_once(length: int, head: int, most: int) -> None:
    head = min(head, length)
    ids = list(range(length))
    pieces = split_row(ids, head, most)
    assert all(len(piece.ids) <= most for piece in pieces)
    assert len(pieces) <= 1 or all(piece.ids[:head] == ids[:head] for piece in pieces)
    held = [token for piece in pieces for token in piece.ids[piece.start :]]
    assert held == ids[: len(held)]
    assert lost(ids, pieces) == length - len(held)
    # A head beyond half a row is not repeated: the example is cut.
    assert len(held) == (length if most - head >= max(2, head) else min(length, most))
    # The first new token of a row is predicted from the one before it.
    assert all(piece.ids[piece.start - 1] == piece.ids[piece.start] - 1 for piece in pieces[1:])
    # Rows are not many more than the tokens ask for.
    assert len(pieces) <= 1 + 2 * length / max(1, most - 2) + 1 or most < 8


@given(st.data(), st.sampled_from([CHATML, WITH_BOS, MARKED, PLAIN, CLOSED]), st.integers(12, 90), st.booleans())
@settings(max_examples=80, deadline=None)
def test_parts_of_a_conversation_learn_what_the_whole_does(
    data: st.DataObject, template: str, most: int, system: bool
) -> None:
    words = st.text("abc ", min_size=1, max_size=30).map(lambda text: f"a{text}b")
    turns = data.draw(st.lists(st.tuples(words, words), min_size=1, max_size=5))
    messages = chat(*(content for turn in turns for content in turn), system="be" if system else None)
    template_of = ChatTemplate(byte_tokenizer(template))
    (whole,), (labels,), _ = template_of.encode([messages])
    found = split_conversations(template_of, [messages], most)
    assert all(len(row) <= most for row in found.tokens)
    assert found.tags is not None
    assert found.lost is not None
    assert found.of == [0] * len(found.tokens)
    # What closes a conversation closes each part.
    end = {template_of.tokenizer.eos_token_id, template_of.tokenizer.convert_tokens_to_ids("Ċ")}
    learnt = [tag for tags in found.tags for tag in tags if tag != IGNORED and tag not in end]
    expected = [tag for tag in labels if tag != IGNORED and tag not in end]
    assert (learnt == expected) or found.lost[0] > 0
    longest_prompt = max(len(ids) for ids in template_of.prompts([messages[: n + 1] for n in _questions(messages)]))
    if 2 * longest_prompt <= most:
        assert learnt == expected
        assert found.lost == [0]
    if len(whole) <= most:
        assert (found.tokens, found.tags) == ([whole], [labels])
    for row, tags in zip(found.tokens, found.tags, strict=True):
        assert len(row) == len(tags)
        assert all(tag in (IGNORED, token) for token, tag in zip(row, tags, strict=True))


def _questions(messages: list[dict[str, str]]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "user"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))


def config(model: Path, rows: list[dict[str, Any]], path: Path, /, length: int = 8, **sections: Any) -> Config:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    data = {"name": str(path), "test": str(path), "long_texts": "split", "partition": {"clients": 3}}
    content = {
        "model": {"name": str(model), "task": "causal-lm", "max_length": length},
        "data": data | sections.pop("data", {}),
        "method": {"name": "fedit"},
        **sections,
    }
    return load_config(content)


def words_of(model: Path, table: TokenTable, row: int) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer.convert_ids_to_tokens(table.tokens[table.offsets[row] : table.offsets[row + 1]].tolist())


def numbered(count: int, first: int = 10) -> str:
    return " ".join(f"w{first + n}" for n in range(count))


TEXTS = [{"text": numbered(3 + 5 * (n % 6)), "domain": f"d{n % 2}", "owner": f"o{n % 6}"} for n in range(12)]


def test_a_text_is_split_and_stays_with_its_owner(model: Path, tmp_path: Path) -> None:
    made = config(model, TEXTS, tmp_path / "own.jsonl", data={"partition": {"kind": "natural", "column": "owner"}})
    data = prepare_data(made)
    whole = prepare_data(config(model, TEXTS, tmp_path / "own.jsonl", 32, data={"partition": {"clients": 1}}))
    assert data.train.lengths.max() == 8
    labels = data.train.batch(np.arange(len(data.train)))["labels"].numpy()
    # Every token but a text's first is a target once.
    assert int((labels[:, 1:] != IGNORED).sum()) == int((whole.train.lengths - 1).sum())
    assert data.client_names == [f"o{n}" for n in range(6)]
    for owner, rows in enumerate(data.partition):
        held = [word for row in rows for word in words_of(model, data.train, row)]
        assert {*held} == {*numbered(3 + 5 * owner).split(), "</s>"}
        assert data.train.domain is not None
        assert {*data.train.domain[rows]} == {owner % 2}
    assert sorted(np.concatenate(list(data.partition)).tolist()) == list(range(len(data.train)))
    # 4, 9, 14, 19, 24 and 29 tokens: a row of 8, and then of 7 new ones each.
    assert data.partition.sizes.tolist() == [2 * n for n in (1, 2, 2, 3, 4, 4)]
    for name in ("train", "test"):
        assert f"model.max_length = 8 splits 10 of 12 texts of {name} into 30 rows" in data.notes


def test_what_a_client_tests_on_is_of_other_texts(model: Path, tmp_path: Path) -> None:
    rows = [{"text": numbered(12, 9 + 2 * n)} for n in range(14)]
    data = prepare_data(config(model, rows, tmp_path / "own.jsonl", data={"client_test": 0.5}))
    assert data.client_test is not None
    assert len(data.train) == 28
    texts = [[{row // 2 for row in part} for part in held] for held in (data.partition, data.client_test)]
    assert all(own.isdisjoint(held) for own, held in zip(*texts, strict=True))
    assert sorted(text for part in texts for held in part for text in held) == list(range(14))


def test_every_row_of_an_answer_has_the_prompt(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"p": "w9 w10", "a": numbered(9, 20)},
        {"p": "w9 w10", "a": "w11"},
        {"p": numbered(5), "a": numbered(9, 20)},
        {"p": numbered(9), "a": "w40"},
    ]
    columns = {"prompt": "p", "answer": "a", "partition": {"clients": 1}}
    with caplog.at_level(logging.WARNING):
        data = prepare_data(config(model, rows, tmp_path / "own.jsonl", data=columns))
    found = [words_of(model, data.train, row) for row in range(len(data.train))]
    assert found == [
        ["w9", "w10", *numbered(6, 20).split()],
        ["w9", "w10", *numbered(4, 25).split(), "</s>"],
        ["w9", "w10", "w11", "</s>"],
        [*numbered(5).split(), *numbered(3, 20).split()],  # its prompt takes more than half of a row
    ]
    assert data.train.answer_start is not None
    assert data.train.answer_start.tolist() == [2, 3, 2, 5]
    assert "1 of 5 rows of train dropped" in caplog.text
    told = "splits 1 of 4 texts of train into 2 rows and cuts 2 of 4 rows of train: 10 of 42 tokens are dropped"
    assert f"model.max_length = 8 {told}, and 1 rows without an answer" in data.notes


def test_a_conversation_is_split_between_its_exchanges(model: Path, tmp_path: Path) -> None:
    messages = chat("w9", "w10", "w11", "w12", "w13", "w14 w15", system="w16")
    tokenizer = AutoTokenizer.from_pretrained(model)
    two = len(tokenizer.apply_chat_template(messages[:5], return_dict=False))
    columns = {"messages": "m", "partition": {"clients": 1}}
    data = prepare_data(config(model, [{"m": messages}], tmp_path / "own.jsonl", two, data=columns))
    parts = [messages[:5], [messages[0], *messages[5:]]]
    assert [words_of(model, data.train, row) for row in range(len(data.train))] == [
        tokenizer.convert_ids_to_tokens(tokenizer.apply_chat_template(part, return_dict=False)) for part in parts
    ]


def test_a_private_run_says_that_epsilon_is_of_a_row(model: Path, tmp_path: Path) -> None:
    privacy = {"mode": "example", "target_epsilon": 8.0, "target_delta": 1e-2}
    for mode, told in (({"privacy": privacy}, True), ({}, False)):
        data = prepare_data(config(model, TEXTS, tmp_path / "own.jsonl", **mode))
        note = "epsilon is that of one row, and a text of train is split into up to 4 rows"
        assert (note in data.notes) == told
    kept = prepare_data(config(model, TEXTS, tmp_path / "own.jsonl", privacy=privacy, data={"long_texts": "cut"}))
    assert len(kept.train) == 12
    assert kept.notes[0] == "model.max_length = 8 cuts 10 of 12 rows of train: 110 of 198 tokens are dropped"


def test_nodes_do_not_split(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="set it to cut") as error:
        config(model, TEXTS, tmp_path / "own.jsonl", data={"name": "nodes", "partition": {"kind": "iid"}})
    assert error.value.field == "data.long_texts"


def parts_of(data: FederatedData) -> list[list[int]]:
    return [rows.tolist() for rows in data.partition]


def test_another_partition_of_the_same_tokens(model: Path, tmp_path: Path) -> None:
    first = prepare_data(config(model, TEXTS, tmp_path / "own.jsonl"))
    other = prepare_data(config(model, TEXTS, tmp_path / "own.jsonl", data={"partition": {"clients": 4}}))
    assert first.folder == other.folder
    assert [sorted(row for part in parts_of(data) for row in part) for data in (first, other)] == [
        list(range(len(first.train)))
    ] * 2
