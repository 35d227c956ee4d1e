"""Conversations become tokens, of which the assistant's turns alone are learnt."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import InputError
from fedlora.tasks import IGNORED, get_task
from fedlora.tasks.chat import ChatError, ChatTemplate
from tests.chats import (
    CHATML,
    CLOSED,
    DATED,
    MARKED,
    MARKED_WITH_END,
    MARKS,
    PLAIN,
    STRICT,
    THINKING,
    WITH_BOS,
    byte_tokenizer,
    chat,
)

LONG = chat("Hi", "Hello.", "2 + 2?", "4", "Thanks", system="Be brief.")
"""The user has the last word."""


def learnt(tokenizer: Any, labels: list[int]) -> list[str]:
    """Return the runs of tokens that have a label, as texts."""
    runs: list[list[int]] = []
    for number, label in enumerate(labels):
        if label == IGNORED:
            continue
        if number == 0 or labels[number - 1] == IGNORED:
            runs.append([])
        runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, MARKED, MARKED_WITH_END, STRICT.replace("'system'", "'none'")])
def test_all_turns_of_the_assistant_are_learnt_with_their_ends(template: str) -> None:
    tokenizer = byte_tokenizer(template, bos=True)
    (row,), (labels,), refused = ChatTemplate(tokenizer).encode([LONG])
    assert refused == {}
    assert learnt(tokenizer, labels) == ["Hello.<|im_end|>", "4<|im_end|>"]
    assert all(label in (IGNORED, token) for token, label in zip(row, labels, strict=True))
    # The row is what transformers makes of the conversation, up to the end of the last turn.
    whole = tokenizer.apply_chat_template(LONG, tokenize=True, return_dict=False)
    assert row == whole[: len(row)]
    assert row.count(tokenizer.bos_token_id) == ("bos_token" in template)
    assert row[-1] == tokenizer.convert_tokens_to_ids(MARKS[1])


def test_marked_turns_are_those_of_transformers() -> None:
    tokenizer = byte_tokenizer(MARKED)
    (row,), (labels,), _ = ChatTemplate(tokenizer).encode([LONG])
    found = tokenizer.apply_chat_template(LONG, return_assistant_tokens_mask=True)
    mask = found["assistant_masks"][: len(row)]
    ends = [place for place in range(1, len(row)) if mask[place - 1] and not mask[place]]
    assert len(ends) == 2
    for end in ends:  # the marks leave out the end-of-turn tokens
        mask[end] = 1
    assert [label != IGNORED for label in labels] == [bool(inside) for inside in mask]


texts = st.text(st.characters(codec="utf-8", exclude_characters="<>\x00"), min_size=1).filter(str.strip)


@given(st.lists(texts, min_size=2, max_size=5))
def test_what_is_learnt_is_what_was_said(contents: list[str]) -> None:
    tokenizer = byte_tokenizer(CHATML)
    messages = chat(*contents)
    (row,), (labels,), refused = ChatTemplate(tokenizer).encode([messages])
    assert refused == {}
    answers = [m["content"] + MARKS[1] for m in messages if m["role"] == "assistant"]
    # A token that the end of the prompt and a line break of the answer share is the answer's.
    assert [text.removeprefix("\n") for text in learnt(tokenizer, labels)] == [a.removeprefix("\n") for a in answers]
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    written = tokenizer.apply_chat_template(messages[: last + 1], tokenize=True, return_dict=False)
    assert row == written[:-1]  # without the line break behind the end of the turn


def test_a_token_over_the_edge_of_a_turn_is_learnt() -> None:
    tokenizer = byte_tokenizer(CHATML)
    (row,), (labels,), _ = ChatTemplate(tokenizer).encode([chat("Hi", "\nyes")])
    assert learnt(tokenizer, labels) == ["\n\nyes<|im_end|>"]
    assert row == tokenizer.apply_chat_template(chat("Hi", "\nyes"), tokenize=True, return_dict=False)[:-1]


def test_a_template_without_an_end_of_turn_gets_the_end_of_sequence() -> None:
    tokenizer = byte_tokenizer(PLAIN)
    template = ChatTemplate(tokenizer)
    (row,), (labels,), _ = template.encode([LONG])
    assert learnt(tokenizer, labels) == [" Hello.", " 4</s>"]
    assert row.count(tokenizer.eos_token_id) == 1
    assert template.ends_of_turn() == {tokenizer.eos_token_id}
    assert ChatTemplate(byte_tokenizer(CHATML)).ends_of_turn() == {tokenizer.convert_tokens_to_ids(MARKS[1])}


@pytest.mark.parametrize("template", [CLOSED, CLOSED.replace("'\n' }}{% endfor", "'' }}{% endfor")])
def test_a_template_that_closes_conversations(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    (row,), (labels,), refused = ChatTemplate(tokenizer).encode([LONG[:-1]])
    assert refused == {}
    line = "\n" if template == CLOSED else ""
    assert learnt(tokenizer, labels) == ["Hello.<|im_end|>", f"4<|im_end|>{line}</s>"]
    assert row == tokenizer.apply_chat_template(LONG[:-1], tokenize=True, return_dict=False)
    ends = tokenizer.convert_tokens_to_ids([MARKS[1], "</s>"])
    assert ChatTemplate(tokenizer).ends_of_turn() == set(ends)
    # What was said may hold the words of the prompt, and white space around it.
    odd = chat("b", "b", "b b", " b\n", "b", "b")
    (row,), (labels,), refused = ChatTemplate(tokenizer).encode([odd])
    assert [text.split("<|im_end|>")[0] for text in learnt(tokenizer, labels)] == ["b", " b\n", "b"]


def test_what_a_template_does_not_take_is_said_of_its_conversation_alone() -> None:
    conversations = [chat("a", "b"), LONG, chat("c", "d")]
    rows, labels, refused = ChatTemplate(byte_tokenizer(STRICT)).encode(conversations)
    assert list(refused) == [1]
    assert "System role not supported" in refused[1]
    assert rows[1] == labels[1] == []
    alone, _, _ = ChatTemplate(byte_tokenizer(STRICT)).encode(conversations[::2])
    assert rows[::2] == alone


def test_a_template_whose_beginnings_change_is_refused_where_that_matters() -> None:
    tokenizer = byte_tokenizer(THINKING)
    rows, labels, refused = ChatTemplate(tokenizer).encode([chat("Hi", "Hello."), chat("Hi", "Hello.", "2?", "4")])
    assert list(refused) == [1]
    assert "cannot be divided into turns" in refused[1]
    # Reasoning is off, so that the prompt of generation ends where the answer begins.
    assert learnt(tokenizer, labels[0]) == ["Hello.<|im_end|>"]
    (prompt,) = ChatTemplate(tokenizer).prompts([chat("Hi")])
    assert prompt == rows[0][: len(prompt)]


def test_tokens_do_not_depend_on_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(DATED)
    assert datetime.datetime.now().strftime("%Y") in tokenizer.apply_chat_template(LONG, tokenize=False)
    (row,), _, refused = ChatTemplate(tokenizer).encode([LONG])
    assert not refused
    assert tokenizer.decode(row).startswith("Today: 26 Jul 2024\n<|im_start|>system")


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(InputError, match="no chat template") as error:
        ChatTemplate(byte_tokenizer(None))
    assert error.value.field == "model.name"
    named = byte_tokenizer(None)
    named.chat_template = {"tool_use": CHATML}
    with pytest.raises(InputError, match="no chat template"):
        ChatTemplate(named)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_prompts_end_where_the_last_answer_begins(template: str) -> None:
    tokenizer, task = byte_tokenizer(template), get_task("causal-lm")
    examples = {"messages": [LONG, chat("Say a", "a b")]}
    encoded = task.encode(tokenizer, examples, 1000, False)
    prompts = task.prompts(tokenizer, examples)
    assert encoded.tags is not None
    for prompt, row, labels in zip(prompts, encoded.tokens, encoded.tags, strict=True):
        assert row[: len(prompt)] == prompt
        assert labels[len(prompt)] != IGNORED
        assert labels[len(prompt) - 1] == IGNORED
    # Answers that are tried in its place; the first one is its own, without its end.
    found = task.answered(tokenizer, examples, [["4", "5 apples"], ["a b", "c", "d"]])
    texts = [(tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])) for ids, start in found]
    asked = [tokenizer.decode(prompt) for prompt in prompts]
    assert texts == [(asked[0], "4"), (asked[0], "5 apples"), *((asked[1], answer) for answer in ("a b", "c", "d"))]
    assert found[0][0] == encoded.tokens[0][:-1]


def test_prompt_and_answer_without_a_template_are_as_they_were() -> None:
    tokenizer, task = byte_tokenizer(CHATML, bos=True), get_task("causal-lm")
    examples = {"prompt": ["one ", "two "], "answer": ["1", "2"]}
    encoded = task.encode(tokenizer, examples, 1000, False)
    assert [tokenizer.decode(row) for row in encoded.tokens] == ["<s>one 1</s>", "<s>two 2</s>"]
    assert encoded.starts == [5, 5]
    assert [row[:5] for row in encoded.tokens] == task.prompts(tokenizer, examples)
    found = task.answered(tokenizer, examples, [["1", "22"], ["2"]])
    assert [(tokenizer.decode(ids), start) for ids, start in found] == [
        ("<s>one 1", 5), ("<s>one 22", 5), ("<s>two 2", 5),
    ]  # fmt: skip


def test_a_prompt_that_a_template_does_not_take() -> None:
    with pytest.raises(ChatError, match="System role"):
        ChatTemplate(byte_tokenizer(STRICT)).prompts([LONG[:2]])
