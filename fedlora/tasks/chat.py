"""Conversations through a tokenizer's chat template: which of their tokens a model learns, and what it is asked with.

A template is a program of the model's, of which nothing is known but what it writes. The extent of a turn is found by
what the template writes of the conversation up to there; or by its ``{% generation %}`` blocks, if it has some.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.errors import InputError
from fedlora.tasks.base import IGNORED
from fedlora.tasks.texts import tokenise

ROLES = ("system", "user", "assistant")

Conversation = Sequence[Mapping[str, str]]
"""Messages, each with ``role`` and ``content``."""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""Goes before a template that writes today's date: the same examples are the same tokens on every day and node."""


class ChatError(ValueError):
    """A conversation that the chat template refuses, or in whose text no turn can be found."""


def conversation(prompt: str, answer: str) -> list[dict[str, str]]:
    """Return a prompt and its answer as one turn of the user and one of the assistant."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def without_answer(messages: Conversation) -> Conversation:
    """Return the messages before the assistant's last turn."""
    return messages[: _last_turn(messages)]


def answer_of(messages: Conversation) -> str:
    """Return the assistant's last turn."""
    return messages[_last_turn(messages)]["content"]


def _last_turn(messages: Conversation) -> int:
    return max(number for number, message in enumerate(messages) if message["role"] == "assistant")


@dataclass(frozen=True)
class _Written:
    """A conversation as the template writes it.

    Attributes
    ----------
    text : str
    turns : list of (str, str)
        For every turn of the assistant, the text before it, and that up to its end. White space behind the
        end-of-turn token is no part of it.
    """

    text: str
    turns: list[tuple[str, str]]


class ChatTemplate:
    """A tokenizer's chat template.

    Reasoning is switched off (``enable_thinking``) where a template knows it: the examples hold none.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    InputError
        If the tokenizer has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        try:
            template: str = tokenizer.get_chat_template()
        except ValueError:
            remedy = "its tokenizer has no chat template; take a model that has one, or data.prompt and data.answer"
            raise InputError("model.name", tokenizer.name_or_path, f"{remedy} without data.template") from None
        self.template = _DATE + template if "strftime_now" in template else template
        self.marks_turns = _MARKED.search(template) is not None
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}

    def write(self, messages: Conversation, *, prompt: bool = False) -> str:
        """Return a conversation as text; with ``prompt``, up to where the assistant's next turn begins.

        Raises
        ------
        ChatError
            If the template does not take it.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
                enable_thinking=False,
            )
        except Exception as error:  # whatever the template raises
            raise ChatError(f"is not taken by the model's chat template ({_first_line(error)})") from None
        return text

    def encode(self, conversations: Sequence[Conversation]) -> tuple[list[list[int]], list[list[int]], dict[int, str]]:
        """Tokenise conversations, each up to the end of the assistant's last turn: behind it nothing is learnt.

        A turn ends with the template's own end-of-turn token. If it writes none, the end-of-sequence token closes the
        last turn. No other token is added: a template writes the first one itself.

        Returns
        -------
        (list, list, dict)
            Token ids; their labels, which are the ids of the assistant's turns and else -100; and, by number, why a
            conversation cannot be used, whose ids are empty.
        """
        written: dict[int, _Written] = {}
        refused: dict[int, str] = {}
        for number, messages in enumerate(conversations):
            try:
                written[number] = self._written(messages)
            except ChatError as error:
                refused[number] = str(error)
        texts = [t for found in written.values() for t in (found.text, *itertools.chain(*found.turns))]
        tokens = iter(tokenise(self.tokenizer, texts, None, special=False)["input_ids"])
        rows: list[list[int]] = [[] for _ in conversations]
        labels: list[list[int]] = [[] for _ in conversations]
        for number, found in written.items():
            whole = next(tokens)
            turns = [(shared_length(next(tokens), whole), shared_length(next(tokens), whole)) for _ in found.turns]
            rows[number], labels[number] = self._labelled(whole, turns)
        return rows, labels, refused

    def prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Return the token ids that the assistant's next turn follows.

        Raises
        ------
        ChatError
        """
        texts = [self.write(messages, prompt=True) for messages in conversations]
        found: list[list[int]] = tokenise(self.tokenizer, texts, None, special=False)["input_ids"]
        return found

    def ends_of_turn(self) -> set[int]:
        """Return the special tokens that end the assistant's last turn, one after the other."""
        sample = conversation("a", "b")
        (row,), _, refused = self.encode([sample])
        if refused:
            return set()
        said = self.write(sample[:1], prompt=True) + sample[1]["content"]
        (ids,) = tokenise(self.tokenizer, [said], None, special=False)["input_ids"]
        return self.special.intersection(row[shared_length(ids, row) :])

    def _written(self, messages: Conversation) -> _Written:
        if not messages:
            raise ChatError("holds no message")
        if self.marks_turns:
            return self._marked(messages)
        text = self.write(messages)
        turns = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.write(messages[:number], prompt=True)
            after = self._after(text, before, self.write(messages[: number + 1]), message["content"].strip())
            if after is None:
                raise ChatError(
                    f"cannot be divided into turns: the model's chat template changes message {number + 1} when another"
                    " follows; let conversations end with their first answer, or take a template with {% generation %}"
                )
            turns.append((before, after.rstrip()))
        return _Written(text, turns)

    @staticmethod
    def _after(text: str, before: str, alone: str, said: str) -> str | None:
        """Return a text up to the end of a turn; None if it cannot be told.

        Parameters
        ----------
        text, before : str
            The whole conversation, and what goes before the turn.
        alone : str
            The conversation as it is written if it ends with the turn.
        said : str
            The turn's content.
        """
        after = alone[: shared_length(alone, text)]
        if after == alone and after.startswith(before):
            return after
        # Some templates close a conversation, such as with an end-of-sequence token that goes when more follows.
        place = after.find(said, len(before)) if after.startswith(before) else -1
        found = None if place < 0 else re.compile(r"\s*\S+").match(after, place + len(said))
        return None if found is None else after[: found.end()]

    def _marked(self, messages: Conversation) -> _Written:
        """Find the turns by the template's own marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [[dict(message) for message in messages]],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, "enable_thinking": False},
            )
        except Exception as error:  # whatever the template raises
            raise ChatError(f"is not taken by the model's chat template ({_first_line(error)})") from None
        (text,), (places,) = rendered
        if not places:
            raise ChatError("has no turn of the assistant's in the {% generation %} blocks of the model's template")
        return _Written(text, [(text[:start], text[:stop].rstrip()) for start, stop in places])

    def _labelled(self, ids: list[int], turns: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Return a row up to the end of its last turn, and its labels."""
        labels, end = [IGNORED] * len(ids), 0
        for start, stop in turns:
            end = self._end(ids, start, stop)
            labels[start:end] = ids[start:end]
        row, labels = ids[:end], labels[:end]
        if row and row[-1] not in self.special:
            row, labels = [*row, self.tokenizer.eos_token_id], [*labels, self.tokenizer.eos_token_id]
        return row, labels

    def _end(self, ids: list[int], start: int, stop: int) -> int:
        """Return where a turn ends, its end-of-turn token included, which marks may leave out."""
        left_out = self.marks_turns and stop < len(ids) and ids[stop] in self.special
        return stop + 1 if left_out and ids[stop - 1] not in self.special else max(start, stop)


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many leading tokens (or letters) are the same.

    A token that reaches over the end of the first text is none of it.
    """
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
