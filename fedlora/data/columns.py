"""Columns of a table: texts, words and owners, each value checked; an error names the column and the row."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.config import Config
from fedlora.data.files import Table, first_line
from fedlora.errors import InputError
from fedlora.tasks.chat import ROLES
from fedlora.tasks.labels import INTEGER, NUMBER, Column, as_word, is_missing, shown


def check_column(table: Table, column: str, field: str, where: str = "") -> None:
    """Refuse a column that is not there, or whose name several have.

    Raises
    ------
    InputError
        Naming ``field``, and ``where`` the column is not.
    """
    if column not in table.columns:
        raise InputError(field, column, f"there is no such column{where}; columns: {listed(table.columns)}")
    if column in table.repeated:
        raise InputError(field, column, "is the name of several columns; rename all but one")


def read_column(table: Table, column: str, field: str) -> list[Any]:
    """Read a column.

    Raises
    ------
    InputError
        If it is not there, several have its name, or it cannot be read.
    """
    check_column(table, column, field)
    try:
        values = table.columns[column]()
    except Exception as error:  # the file may be damaged in any way
        raise InputError(field, column, f"cannot be read ({first_line(error)}); fix the column") from error
    for row, value in enumerate(values):
        if isinstance(value, str) and not value.isascii() and not _is_unicode(value):
            raise _half_of_a_pair(table, row, column, field)
    return values


def listed(names: Mapping[str, Any]) -> str:
    """List names, as many as one line bears."""
    shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in list(names)[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def cells(table: Table, column: str, field: str, rows: Sequence[int], source: str, notes: list[str]) -> Column:
    """Return the cells of some rows, for a task to read its labels from.

    Raises
    ------
    InputError
        If the column cannot be read.
    """
    values = read_column(table, column, field)
    return Column(
        field,
        column,
        [values[row] for row in rows],
        lambda number: table.place(rows[number]),
        source,
        table.typed,
        table.classes.get(column),
        notes,
    )


def read_texts(table: Table, column: str, field: str, source: str) -> list[str | None]:
    """Read the texts; None where there is none.

    Raises
    ------
    InputError
        Naming column and row of a value that is no text.
    """
    texts = read_column(table, column, field)
    for row, text in enumerate(texts):
        if is_missing(text):
            texts[row] = None
        elif not isinstance(text, str):
            remedy = f"{table.place(row)} of {source} holds {shown(text)}, not text; fix it, or name another column"
            raise InputError(field, column, remedy)
    if not table.typed and all(text is None or NUMBER.fullmatch(text.strip()) for text in texts) and any(texts):
        raise InputError(field, column, f"holds numbers alone in {source}, not text; name the column of the texts")
    return texts


def read_words(table: Table, column: str, field: str, source: str) -> list[list[str] | None]:
    """Read lists of words, or text that is divided at white space; None where there is none.

    Raises
    ------
    InputError
        Naming column and row of a value that is neither, or of a word that is no text.
    """
    found: list[list[str] | None] = []
    for row, value in enumerate(read_column(table, column, field)):
        if is_missing(value):
            found.append(None)
            continue
        words = value.split() if isinstance(value, str) else value
        wrong = [w for w in words if not isinstance(w, str)] if isinstance(words, list | tuple) else [value]
        if wrong:
            remedy = f"{table.place(row)} of {source} holds {shown(wrong[0])}, not words; name another column"
            raise InputError(field, column, remedy)
        if not all(map(_is_unicode, words)):
            raise _half_of_a_pair(table, row, column, field)
        found.append(list(words))
    return found


def read_messages(table: Table, column: str, field: str, source: str) -> list[list[dict[str, str]] | None]:
    """Read conversations; None where there is none.

    Raises
    ------
    InputError
        Naming column and row of a value that is no conversation with a turn of the assistant's.
    """
    found: list[list[dict[str, str]] | None] = []
    for row, value in enumerate(read_column(table, column, field)):
        if is_missing(value):
            found.append(None)
            continue
        why = not_messages(value)
        if why:
            raise InputError(field, column, f"{table.place(row)} of {source} {why}")
        found.append([{"role": message["role"], "content": message["content"]} for message in value])
    return found


_UNREAD = ("tool_calls", "function_call", "weight")
"""Keys of a message that would change what is learnt."""


def not_messages(value: Any) -> str:
    """Say why a value is no conversation that can be learnt from, and what to do; "" if it is one."""
    if not isinstance(value, list | tuple):
        return f"holds {shown(value)}, not a list of messages; name another column, or give JSONL or Parquet"
    if not value:
        return "holds an empty list; give it messages, or remove the row"
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            return f"has a message {number} without role and content ({shown(message)}); give each both"
        role, content = message["role"], message["content"]
        if role not in ROLES:
            return f"has the role {role!r:.40} in message {number}; use {', '.join(ROLES)}, or remove the row"
        if not isinstance(content, str):
            return f"has {shown(content)} as content of message {number}, not text; fix it, or remove the row"
        if not _is_unicode(content):
            return f"has half of a surrogate pair in message {number}, which is no text; fix it"
        unread = [key for key in _UNREAD if message.get(key) is not None]
        if unread:
            return f"has {unread[0]} in message {number}, which is not read; remove it, or the row"
    turns = [message for message in value if message["role"] != "system"]
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        return "has no turn of the assistant's with text; add one, or remove the row"
    if turns[0]["role"] == "assistant":
        return "begins with the assistant's turn; let the user begin, or remove the row"
    return ""


def read_choices(column: Column, answers: Sequence[str] | None) -> list[list[str]]:
    """Read lists of answers to choose from.

    Parameters
    ----------
    column : Column
    answers : sequence of str, optional
        The right ones, each of which must be among its row's choices.

    Raises
    ------
    InputError
        Naming column and row of a value that is no list of two or more different texts, or lacks the right one.
    """
    for number, value in enumerate(column.cells):
        texts = isinstance(value, list | tuple) and all(isinstance(choice, str) and choice.strip() for choice in value)
        if not texts or not all(map(_is_unicode, value)) or len(set(value)) < max(2, len(value)):
            raise column.error(number, f"holds {shown(value)}, not two or more different texts; fix the row")
        if answers is not None and answers[number] not in value:
            remedy = f"lacks the right answer, {shown(answers[number])}; add it, or fix the answer"
            raise column.error(number, remedy)
    return [list(value) for value in column.cells]


def _half_of_a_pair(table: Table, row: int, column: str, field: str) -> InputError:
    return InputError(field, column, f"{table.place(row)} holds half of a surrogate pair, which is no text; fix it")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_owners(
    table: Table, column: str, rows: Sequence[int], source: str, field: str = "data.partition.column"
) -> list[str] | list[int] | list[float]:
    """Read what rows have in a column that says whose they are: whole numbers, numbers, or words.

    Raises
    ------
    InputError
        Naming column and row of a value that is none of these.
    """
    values = read_column(table, column, field)
    owners = [values[row] for row in rows]
    for row, owner in zip(rows, owners, strict=True):
        if is_missing(owner) or not isinstance(owner, str | int | float):
            remedy = f"{table.place(row)} of {source} has {shown(owner)} there; every row needs a word or a number"
            raise InputError(field, column, remedy)
    if not table.typed and all(INTEGER.fullmatch(owner) for owner in owners):
        owners = [int(owner) for owner in owners]
    elif not table.typed and all(NUMBER.fullmatch(owner) for owner in owners):
        owners = [float(owner) for owner in owners]
    mixed = len({type(owner) for owner in owners}) > 1
    large = any(isinstance(owner, int) and abs(owner) >= 2**63 for owner in owners)
    return [str(owner) for owner in owners] if mixed or large else owners


def alike_classes(config: Config, names: list[str]) -> list[str]:
    """Note classes that differ only in how they are written."""
    groups: dict[str, list[str]] = {}
    for name in names:
        folded = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        number = NUMBER.fullmatch(folded) and as_word(float(folded), numbers=False)
        groups.setdefault(number or folded, []).append(name)
    found = [" and ".join(map(repr, group[:5])) for group in groups.values() if len(group) > 1]
    if not found:
        return []
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return [f"{config.data.label}: {'; '.join(found[:3])}{more} are separate classes, though they look alike"]
