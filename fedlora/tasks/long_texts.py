"""Long examples of a language model as several rows: no token is lost, and each is predicted once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.tasks.base import IGNORED, Encoded
from fedlora.tasks.chat import ChatTemplate, Conversation


@dataclass(frozen=True)
class Piece:
    """A row of a long example.

    Attributes
    ----------
    ids : list of int
    start : int
        Number of leading tokens without a loss, which other rows hold too.
    tags : list of int
        The label of every token, -100 for none; empty where every token behind ``start`` is its own.
    """

    ids: list[int]
    start: int
    tags: list[int]


def split_row(ids: list[int], head: int, max_length: int, tags: Sequence[int] = ()) -> list[Piece]:
    """Split an example into rows of at most ``max_length`` tokens, each with the example's head in front.

    Behind the head a row goes on with the last token of the row before, without a loss: from it the first new token is
    predicted, as in the rolling windows of lm-evaluation-harness.

    Parameters
    ----------
    ids : list of int
    head : int
        Number of leading tokens that all rows begin with: a prompt, or what a tokenizer writes before every text.
    max_length : int
    tags : sequence of int
        The label of every token; by default the tokens are the labels.

    Returns
    -------
    list of Piece
        A single one, which is cut, where the head takes more than half of a row, or leaves less than two tokens: rows
        would be as many as tokens.
    """
    pieces, end = [Piece(ids[:max_length], 0, list(tags[:max_length]))], max_length
    room = max_length - head
    while end < len(ids) and room >= max(2, head):
        first, end = end - 1, end - 1 + room
        own = [*[IGNORED] * (head + 1), *tags[first + 1 : end]] if tags else []
        pieces.append(Piece([*ids[:head], *ids[first:end]], head + 1, own))
    return pieces


def split_conversations(template: ChatTemplate, conversations: Sequence[Conversation], max_length: int) -> Encoded:
    """Tokenise conversations, long ones as several of at most ``max_length`` tokens.

    A long conversation is split where a user's message follows an answer, and its system message is in front of each
    part: a part is a conversation, as the template writes it. A part of one question that is still too long is split
    within its answer, with what goes before the answer as the head (:func:`split_row`).

    Parameters
    ----------
    template : ChatTemplate
    conversations : sequence of Conversation
    max_length : int

    Returns
    -------
    Encoded
        With ``of`` and ``lost``; ``texts`` are left to the caller.
    """
    rows, labels, refused = template.encode(conversations)
    found = Encoded(whole=rows, tags=[], of=[], lost=[0] * len(rows), refused=refused)
    assert found.tags is not None
    assert found.of is not None
    assert found.lost is not None
    for number, messages in enumerate(conversations):
        parts = [(rows[number], labels[number])]
        if len(rows[number]) > max_length:
            parts = _parts(template, messages, labels[number], max_length) or parts
        for ids, tags in parts:
            head = next((place for place, tag in enumerate(tags) if tag != IGNORED), 0)
            pieces = split_row(ids, head, max_length, tags)
            found.tokens += [piece.ids for piece in pieces]
            found.tags += [piece.tags for piece in pieces]
            found.of += [number] * len(pieces)
            found.lost[number] += lost(ids, pieces)
    return found


def lost(ids: list[int], pieces: Sequence[Piece]) -> int:
    """Return how many tokens of an example none of its rows holds."""
    return len(ids) - sum(len(piece.ids) - piece.start for piece in pieces)


def _parts(
    template: ChatTemplate, messages: Conversation, tags: list[int], max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Divide a conversation between its exchanges; return the ids and labels of each part, or none if it cannot be.

    How long a part will be is told by the tokens between the ends of the assistant's turns in the whole conversation,
    and by what an exchange alone has before it.
    """
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    exchanges = _exchanges(messages[len(system) :])
    answers = [sum(message["role"] == "assistant" for message in exchange) for exchange in exchanges]
    following = [*tags[1:], IGNORED]
    turns = [n + 1 for n, pair in enumerate(zip(tags, following, strict=True)) if pair[0] != IGNORED == pair[1]]
    if len(exchanges) < 2 or len(turns) != sum(answers):
        return []
    ends = [turns[answered - 1] for answered in itertools.accumulate(answers)]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    (second,), _, refused = template.encode([[*system, *exchanges[1]]])
    if refused:
        return []
    before = max(0, len(second) - sizes[1])
    sizes[0] -= before
    groups, size = [list(exchanges[0])], before + sizes[0]
    for exchange, more in zip(exchanges[1:], sizes[1:], strict=True):
        if size + more > max_length:
            groups.append([])
            size = before
        groups[-1] += exchange
        size += more
    rows, labels, refused = template.encode([[*system, *group] for group in groups])
    return [] if refused else list(zip(rows, labels, strict=True))


def _exchanges(messages: Conversation) -> list[list[dict[str, str]]]:
    """Divide messages before each that follows an answer; what no answer follows is left out."""
    found: list[list[dict[str, str]]] = [[]]
    for message in messages:
        if message["role"] != "assistant" and found[-1] and found[-1][-1]["role"] == "assistant":
            found.append([])
        found[-1].append(dict(message))
    return [one for one in found if one and one[-1]["role"] == "assistant"]
