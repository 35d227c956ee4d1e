"""Columns of a table: texts, labels and owners, each value checked; an error names the column and the row."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.config import Config
from fedlora.data.files import Table, first_line
from fedlora.errors import InputError

INTEGER = re.compile(r"-?(0|[1-9]\d{0,999})")
_NUMBER = re.compile(r"[+-]?(\d{1,300}\.?\d*|\.\d{1,300})(e[+-]?\d{1,3})?", re.IGNORECASE)


def read_column(table: Table, column: str, field: str) -> list[Any]:
    """Read a column.

    Raises
    ------
    InputError
        If it is not there, several have its name, or it cannot be read.
    """
    if column not in table.columns:
        raise InputError(field, column, f"there is no such column; columns: {listed(table.columns)}")
    if column in table.repeated:
        raise InputError(field, column, "is the name of several columns; rename all but one")
    try:
        values = table.columns[column]()
    except Exception as error:  # the file may be damaged in any way
        raise InputError(field, column, f"cannot be read ({first_line(error)}); mend the column") from error
    for row, value in enumerate(values):
        if isinstance(value, str) and not value.isascii() and not _is_unicode(value):
            remedy = f"{table.place(row)} holds half of a surrogate pair, which is no text; mend it"
            raise InputError(field, column, remedy)
    return values


def listed(names: Mapping[str, Any]) -> str:
    """List names, as many as one line bears."""
    shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in list(names)[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def is_missing(value: Any) -> bool:
    """Tell whether a cell is empty: None, or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


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
            remedy = f"{table.place(row)} of {source} holds {_shown(text)}, not text; mend it, or name another column"
            raise InputError(field, column, remedy)
    if not table.typed and all(text is None or _NUMBER.fullmatch(text.strip()) for text in texts) and any(texts):
        raise InputError(field, column, f"holds numbers alone in {source}, not text; name the column of the texts")
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) <= 40 else f'{text[:37]}...'}"


def read_owners(table: Table, column: str, rows: Sequence[int], source: str) -> list[str] | list[int] | list[float]:
    """Read what rows have in the column that is partitioned by: whole numbers, numbers, or words.

    Raises
    ------
    InputError
        Naming column and row of a value that is none of these.
    """
    field, values = "data.partition.column", read_column(table, column, "data.partition.column")
    owners = [values[row] for row in rows]
    for row, owner in zip(rows, owners, strict=True):
        if is_missing(owner) or not isinstance(owner, str | int | float):
            remedy = f"{table.place(row)} of {source} has {_shown(owner)} there; every row needs a word or a number"
            raise InputError(field, column, remedy)
    if not table.typed and all(INTEGER.fullmatch(owner) for owner in owners):
        owners = [int(owner) for owner in owners]
    elif not table.typed and all(_NUMBER.fullmatch(owner) for owner in owners):
        owners = [float(owner) for owner in owners]
    mixed = len({type(owner) for owner in owners}) > 1
    large = any(isinstance(owner, int) and abs(owner) >= 2**63 for owner in owners)
    return [str(owner) for owner in owners] if mixed or large else owners


def read_labels(table: Table, column: str, rows: Sequence[int], source: str, notes: list[str]) -> list[str]:
    """Read the labels of rows as words; a whole number is its digits, so that 1 and 1.0 are one class.

    The cells of a CSV file have no type: they are numbers if all of them are.

    Raises
    ------
    InputError
        Naming column and row of a label that is missing, or neither a word nor a whole number.
    """
    field, values, names = "data.label", read_column(table, column, "data.label"), table.classes.get(column)
    labels = [values[row] for row in rows]
    if names is not None:
        # The hub marks a missing label with -1.
        labels = [None if label is None or label < 0 else label for label in labels]
    for row, label in zip(rows, labels, strict=True):
        if is_missing(label) or (isinstance(label, str) and not label.strip()):
            remedy = f"{table.place(row)} of {source} has no label; fill it in or remove the row"
            raise InputError(field, column, remedy)
    numbers = not table.typed and all(_NUMBER.fullmatch(label.strip()) for label in labels)
    words = []
    spelt: dict[str, dict[str, None]] = {}
    for row, label in zip(rows, labels, strict=True):
        word = _word(label, numbers) if names is None else names[label] if label < len(names) else None
        if word is None:
            remedy = f"{table.place(row)} of {source} holds {_shown(label)}, which is no class; "
            raise InputError(field, column, f"{remedy}labels are words or whole numbers")
        words.append(word)
        spelt.setdefault(word, {})[repr(label)] = None
    for word, ways in spelt.items():
        if len(ways) > 1:
            notes.append(f"{source}: labels written {' and '.join(list(ways)[:5])} are one class, {word!r}")
    return words


def _word(label: Any, numbers: bool) -> str | None:
    """Return a label as a word; None if it is neither a word nor a whole number."""
    if isinstance(label, bool):
        return str(label)
    if isinstance(label, int) and abs(label) < 10**1000:
        return str(label)
    if isinstance(label, float) and math.isfinite(label) and label.is_integer():
        return str(int(label))
    if not isinstance(label, str):
        return None
    word = label.strip()
    # Leading zeros are kept: 007 is a name.
    if not numbers or INTEGER.fullmatch(word) or word.isdecimal():
        return word
    return _word(float(word), numbers)


def alike_classes(config: Config, names: list[str]) -> list[str]:
    """Note classes that differ only in how they are written."""
    groups: dict[str, list[str]] = {}
    for name in names:
        folded = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        number = _NUMBER.fullmatch(folded) and _word(float(folded), numbers=False)
        groups.setdefault(number or folded, []).append(name)
    found = [" and ".join(map(repr, group[:5])) for group in groups.values() if len(group) > 1]
    if not found:
        return []
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return [f"{config.data.label}: {'; '.join(found[:3])}{more} are classes of their own, though they look alike"]
