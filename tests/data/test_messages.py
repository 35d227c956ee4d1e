"""Conversations, prompts through the chat template, and choices: from a file to tokens and questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from fedlora.config import Config, load_config, unused_keys
from fedlora.data.sources import count_own, load_examples
from fedlora.data.tokens import FederatedData, TokenTable, prepare_data
from fedlora.errors import InputError
from fedlora.node.local_node import LocalNode
from tests.chats import CHATML, PLAIN, STRICT, chat, save_chat_llama
from tests.owner import listed, write_node

CHATS = [chat("w9 w10", f"w{11 + n} w12", "w13", f"w{14 + n}", system="w30") for n in range(8)]
GOOD = {"role": "assistant", "content": "w9"}
USER = {"role": "user", "content": "w10"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_llama(tmp_path_factory.mktemp("model") / "llama")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder: Path, name: Path, /, **sections: Any) -> Config:
    data = {"name": str(name), "partition": {"clients": 1}, **sections.pop("data", {})}
    content = {
        "model": {"name": str(folder), "task": "causal-lm", "max_length": 32, **sections.pop("model", {})},
        "data": data,
        "method": {"name": "fedit"},
        **sections,
    }
    return load_config(content)


def learnt(model: Path, table: TokenTable) -> list[list[str]]:
    """Return the words of each row that have a loss."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    labels = table.batch(np.arange(len(table)))["labels"]
    return [tokenizer.convert_ids_to_tokens(row[row != -100]) for row in labels]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_messages_become_tokens_of_which_the_assistants_are_learnt(tmp_path: Path, model: Path, suffix: str) -> None:
    path = write(tmp_path / "own.jsonl", [{"chat": messages} for messages in CHATS])
    if suffix == "parquet":
        path = tmp_path / "own.parquet"
        pq.write_table(pa.table({"chat": CHATS}), path)
    data = prepare_data(config(model, path, data={"messages": "chat", "test": str(path)}))
    assert learnt(model, data.train) == [
        [f"w{11 + n}", "w12", "<|im_end|>", f"w{14 + n}", "<|im_end|>"] for n in range(8)
    ]
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = tokenizer.apply_chat_template(CHATS[3], return_dict=False)
    ids = data.train.batch([3])["input_ids"][0].tolist()
    assert ids == whole
    # Another template is other tokens, whatever the cache holds.
    other = save_chat_llama(tmp_path / "other", PLAIN)
    again = prepare_data(config(other, path, data={"messages": "chat", "test": str(path)}))
    assert learnt(other, again.train)[0] == ["w11", "w12", "w14", "</s>"]


def test_prompts_go_through_the_template_if_told(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "own.jsonl", [{"q": f"w{9 + n}", "a": "w20 w21"} for n in range(8)])
    columns = {"prompt": "q", "answer": "a", "test": str(path)}
    plain = prepare_data(config(model, path, data=columns))
    assert plain.train.answer_start is not None
    assert prepare_data(config(model, path, data={**columns, "template": False})).train.tokens.tolist() == (
        plain.train.tokens.tolist()
    )
    shaped = prepare_data(config(model, path, data={**columns, "template": True}))
    assert learnt(model, plain.train)[0] == ["w20", "w21", "</s>"]
    assert learnt(model, shaped.train)[0] == ["w20", "w21", "<|im_end|>"]
    expected = AutoTokenizer.from_pretrained(model).apply_chat_template(chat("w9", "w20 w21"), return_dict=False)
    assert shaped.train.batch([0])["input_ids"][0].tolist() == expected


def test_long_conversations_are_cut_and_those_without_an_answer_left_out(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [chat("w9 " * 20, "w10"), chat("w9", "w11 " * 20), chat("w9", "w12")]
    path = write(tmp_path / "own.jsonl", [{"m": messages, "domain": f"d{n}"} for n, messages in enumerate(long)])
    columns = {"messages": "m", "test": str(path)}
    data = prepare_data(config(model, path, data=columns, model={"max_length": 16}))
    assert "1 of 3 rows of train dropped" in caplog.text
    assert [len(row) for row in learnt(model, data.train)] == [16 - 6, 2]
    assert data.train.domain is not None
    assert data.train.domain.tolist() == [1, 2]
    assert data.partition.sizes.tolist() == [2]
    assert any("max_length = 16 cuts 2 of 3 rows of train" in note for note in data.notes)
    with pytest.raises(InputError, match="no answer is left"):
        prepare_data(config(model, path, data=columns, model={"max_length": 4}))


BAD = {
    "holds the str": "w9",
    "empty list": [],
    "message 2 without role and content": [USER, {"from": "gpt", "value": "w9"}],
    "the role 'tool' in message 3": [USER, GOOD, {"role": "tool", "content": "w9"}],
    "as content of message 2, not text": [USER, {"role": "assistant", "content": [{"type": "text", "text": "w9"}]}],
    "as content of message 1, not text": [{"role": "user", "content": None}, GOOD],
    "no turn of the assistant's": [USER],
    "turn of the assistant's with text": [USER, {"role": "assistant", "content": " "}],
    "begins with the assistant's turn": [GOOD, USER, GOOD],
    "tool_calls in message 2": [USER, {**GOOD, "tool_calls": [{"id": 1}]}],
    "weight in message 2": [USER, {**GOOD, "weight": 0}],
    "half of a surrogate pair": [USER, {"role": "assistant", "content": "\ud800"}],
}


@pytest.mark.parametrize(("told", "value"), BAD.items())
def test_a_bad_conversation_is_named_with_its_line(tmp_path: Path, model: Path, told: str, value: Any) -> None:
    path = write(tmp_path / "own.jsonl", [{"m": messages} for messages in (CHATS[0], CHATS[1], value, CHATS[2])])
    with pytest.raises(InputError) as error:
        load_examples(config(model, path, data={"messages": "m"}))
    assert error.value.field == "data.messages"
    assert "line 3 of own.jsonl" in str(error.value)
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_the_template_refuses_is_named_with_its_line(tmp_path: Path) -> None:
    strict = save_chat_llama(tmp_path / "strict", STRICT)
    path = write(tmp_path / "own.jsonl", [{"m": chat("w9", "w10")}] * 3 + [{"m": CHATS[0]}])
    with pytest.raises(InputError, match=r"line 4 of own\.jsonl is not taken.*System role not supported") as error:
        prepare_data(config(strict, path, data={"messages": "m", "test": str(path)}))
    assert error.value.field == "data.messages"
    bare = save_chat_llama(tmp_path / "bare", None)
    with pytest.raises(InputError, match="no chat template") as error:
        prepare_data(config(bare, path, data={"messages": "m", "test": str(path)}))
    assert error.value.field == "model.name"


def own(model: Path, path: Path, **data: Any) -> Config:
    """The config that a node makes of a run's, with its own file."""
    return config(model, path, data={"test": "server", **data})


@pytest.mark.parametrize("template", [CHATML, STRICT, "{{ raise_exception('no') }}", "{{ messages[9].content.x }}", ""])
def test_on_a_nodes_own_file_nothing_depends_on_the_texts(tmp_path: Path, template: str) -> None:
    folder = save_chat_llama(tmp_path / "model", template or None)
    odd = [*BAD.values(), *CHATS, chat("w9 " * 99, "w10"), chat("\x00", "<|im_end|>"), 7, {"role": "user"}, None]
    files = [
        write(tmp_path / "odd.jsonl", [{"m": value, "n": 1} for value in odd]),
        write(tmp_path / "good.jsonl", [{"m": chat("w9", "w10"), "n": 1} for _ in odd]),
    ]
    told, found = [], list[FederatedData]()
    for path in files:
        made = own(folder, path, messages="m")
        assert count_own(made) == len(odd)
        try:
            found.append(prepare_data(made))
            told.append("")
        except InputError as error:
            told.append(str(error))
    assert told[0] == told[1]
    assert ("no chat template" in told[0]) == (not template)
    if not template:
        return
    assert [len(data.train) for data in found] == [len(odd)] * 2
    assert all(data.notes == [] for data in found)
    # What cannot be used has no loss; the rest has.
    labels = found[0].train.batch(np.arange(len(odd)))["labels"]
    usable = (labels[:, 1:] != -100).any(1).tolist()
    assert usable[: len(BAD)] == [False] * len(BAD)
    assert usable[len(BAD) : len(BAD) + len(CHATS)] == [template == CHATML] * len(CHATS)


def test_prompts_of_a_node_go_through_the_template_too(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "own.jsonl", [{"q": "w9", "a": "w10"}, {"q": None, "a": ""}])
    data = prepare_data(own(model, path, prompt="q", answer="a", template=True))
    assert learnt(model, data.train)[0] == ["w10", "<|im_end|>"]
    assert len(data.train) == 2


def test_an_owner_names_the_column_and_the_run_the_template(tmp_path: Path, model: Path) -> None:
    rows = [{"m": chat("w9", "w10"), "q": "w11", "a": "w12"}]
    asked = config(model, Path("x"), data={"prompt": "p", "answer": "b", "template": True}, server={"batch_size": 7})
    for columns, words in (({"messages": "m"}, "w10"), ({"prompt": "q", "answer": "a"}, "w12")):
        folder = tmp_path / words
        node = write_node(
            folder, tmp_path / "cache", data={"path": "own.jsonl", **columns}, policy={"models": listed(model)}
        )
        write(folder / "own.jsonl", rows)
        data = prepare_data(LocalNode.open(node).own_config(asked, None))
        assert learnt(model, data.train) == [[words, "<|im_end|>"]]
    write_node(folder, tmp_path / "cache", data={"path": "own.jsonl", "messages": "m", "prompt": "q", "answer": "a"})
    with pytest.raises(InputError) as error:
        LocalNode.open(node)
    assert error.value.field == "data.messages"


MATH = [{"q": f"w{9 + n % 3}", "a": f"w{20 + n}", "options": ["w40", f"w{20 + n}", "w41 w42"]} for n in range(6)]


def test_questions_to_generate_answers_to(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "own.jsonl", MATH)
    columns = {"prompt": "q", "answer": "a", "template": True, "test": str(path)}
    asked = config(model, path, data=columns, evaluation={"kind": "generate", "max_new_tokens": 4})
    data = prepare_data(asked)
    questions = data.questions
    assert questions is not None
    # Equal prompts are one question with several right answers.
    assert questions.references == [["w20", "w23"], ["w21", "w24"], ["w22", "w25"]]
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [row.tolist() for row in np.split(questions.tokens, questions.offsets[1:-1])]
    begun = {"add_generation_prompt": True, "return_dict": False}
    assert rows == [tokenizer.apply_chat_template(chat(f"w{9 + n}"), **begun) for n in range(3)]
    assert questions.stop == sorted(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    # The tokens are shared with runs that ask nothing, or less.
    assert prepare_data(config(model, path, data=columns)).folder == data.folder
    fewer = prepare_data(
        config(model, path, data=columns, evaluation={"kind": "generate", "max_examples": 2} | {"max_new_tokens": 4})
    ).questions
    assert fewer is not None
    assert len(fewer.references) == 2
    with pytest.raises(InputError, match="has 32 positions, and the longest prompt takes") as error:
        prepare_data(config(model, path, data=columns, evaluation={"kind": "generate"}))
    assert error.value.field == "evaluation.max_new_tokens"


def test_questions_to_choose_an_answer_to(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "own.jsonl", MATH)
    columns = {"prompt": "q", "answer": "a", "choices": "options", "test": str(path)}
    questions = prepare_data(config(model, path, data=columns, evaluation={"kind": "choice"})).questions
    assert questions is not None
    assert questions.right == [1] * 6
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [tokenizer.decode(row) for row in np.split(questions.tokens, questions.offsets[1:-1])]
    assert rows == [f"{row['q']} {choice}" for row in MATH for choice in row["options"]]
    assert questions.starts.tolist() == [1] * 18
    # Without a column of answers the first choice is right, and is what is learnt.
    first = prepare_data(
        config(
            model, path, data={"prompt": "q", "choices": "options", "test": str(path)}, evaluation={"kind": "choice"}
        )
    )
    assert first.questions is not None
    assert first.questions.right == [0] * 6
    assert learnt(model, first.train)[0] == ["w40", "</s>"]
    # Of a prompt that is too long the beginning goes.
    short = config(model, path, data=columns, evaluation={"kind": "choice"}, model={"max_length": 2})
    cut = prepare_data(short)
    assert cut.questions is not None
    assert np.diff(cut.questions.offsets).tolist() == [2] * 18
    assert any("cuts the beginning of 6 of 18 prompts" in note for note in cut.notes)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["w9"], "not two or more different texts"),
        ("w9 w10", "not two or more different texts"),
        (["w20", "w20", "w21"], "not two or more different texts"),
        (["w20", 7], "not two or more different texts"),
        (None, "not two or more different texts"),
        (["w20", " "], "not two or more different texts"),
        (["w9", "w10"], "lacks the right answer, the str 'w21'"),
    ],
)
def test_bad_choices_are_named_with_their_line(tmp_path: Path, model: Path, options: Any, told: str) -> None:
    path = write(tmp_path / "own.jsonl", [MATH[0], {**MATH[1], "options": options}])
    columns = {"prompt": "q", "answer": "a", "choices": "options"}
    with pytest.raises(InputError) as error:
        load_examples(config(model, path, data=columns, evaluation={"kind": "choice"}))
    assert error.value.field == "data.choices"
    assert "line 2 of own.jsonl" in str(error.value)
    assert told in str(error.value)


def test_tests_without_choices_are_named(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "own.jsonl", MATH)
    test = write(tmp_path / "test.jsonl", [{"q": "w9", "a": "w10"}])
    columns = {"prompt": "q", "answer": "a", "choices": "options", "test": str(test)}
    with pytest.raises(InputError, match=r"no such column in .*test\.jsonl; columns: q, a") as error:
        prepare_data(config(model, path, data=columns, evaluation={"kind": "choice"}))
    assert error.value.field == "data.choices"


@pytest.mark.parametrize(
    ("data", "evaluation", "field"),
    [
        ({"messages": "m", "prompt": "q", "answer": "a"}, {}, "data.messages"),
        ({"messages": "m", "answer": "a"}, {}, "data.messages"),
        ({"messages": "m", "template": False}, {}, "data.template"),
        ({"choices": "c"}, {}, "data.prompt"),
        ({"prompt": "q"}, {}, "data.prompt"),
        ({}, {"kind": "generate"}, "evaluation.kind"),
        ({"messages": "m"}, {"kind": "choice"}, "data.choices"),
        ({"prompt": "q", "answer": "a"}, {"kind": "choice"}, "data.choices"),
        ({"messages": "m"}, {"kind": "generate", "max_new_tokens": 0}, "evaluation.max_new_tokens"),
        ({"messages": "m"}, {"kind": "generation"}, "evaluation.kind"),
    ],
)
def test_keys_that_do_not_go_together(data: dict[str, Any], evaluation: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as error:
        config(Path("model"), Path("file"), data=data, evaluation=evaluation)
    assert error.value.field == field


def test_a_classifier_answers_nothing() -> None:
    with pytest.raises(InputError, match=r"set model\.task = causal-lm"):
        config(Path("m"), Path("f"), model={"task": "sequence-classification"}, evaluation={"kind": "generate"})


def test_keys_without_use_are_noted() -> None:
    given = config(Path("m"), Path("f"), data={"template": True}, evaluation={"max_examples": 3, "max_new_tokens": 4})
    assert [note.partition(" ")[0] for note in unused_keys(given)] == [
        "data.template", "evaluation.max_new_tokens", "evaluation.max_examples",
    ]  # fmt: skip
    chosen = config(Path("m"), Path("f"), data={"messages": "m", "choices": "c"})
    assert [note.partition(" ")[0] for note in unused_keys(chosen)] == ["data.choices"]
