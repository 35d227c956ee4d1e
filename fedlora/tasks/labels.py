"""Cells of a label column, read as words or numbers; an error names the column and the row."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedlora.errors import InputError

INTEGER = re.compile(r"-?(0|[1-9]\d{0,999})")
NUMBER = re.compile(r"[+-]?(\d{1,300}\.?\d*|\.\d{1,300})(e[+-]?\d{1,3})?", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """The cells of a column in the rows that are kept.

    Attributes
    ----------
    field, name : str
        The config key that names the column, and the column's name.
    cells : list
    place : callable
        Maps an index of ``cells`` to words for its place in the file, such as its line.
    source : str
        The file's name.
    typed : bool
        Whether the source tells numbers from text; the cells of a CSV file are all text.
    classes : list of str, optional
        Names of the classes, where cells are their numbers.
    notes : list of str
        Gets what the user may want to know.
    """

    field: str
    name: str
    cells: list[Any]
    place: Callable[[int], str]
    source: str
    typed: bool = True
    classes: list[str] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def error(self, number: int, why: str) -> InputError:
        """Return an error that names a cell."""
        return InputError(self.field, self.name, f"{self.place(number)} of {self.source} {why}")

    def require(self) -> None:
        """Refuse cells that are empty."""
        for number, cell in enumerate(self.cells):
            if is_missing(cell) or (isinstance(cell, str) and not cell.strip()):
                raise self.error(number, "has no label; fill it in or remove the row")


def is_missing(value: Any) -> bool:
    """Tell whether a cell is empty: None, or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def shown(value: Any) -> str:
    """Write a cell for an error."""
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) <= 40 else f'{text[:37]}...'}"


def read_words(column: Column) -> list[str]:
    """Read every cell as one word; a whole number is its digits, so that 1 and 1.0 are one class.

    The cells of a CSV file have no type: they are numbers if all of them are.

    Raises
    ------
    InputError
        Naming column and row of a label that is missing, or neither a word nor a whole number.
    """
    names = column.classes
    if names is not None:
        # The hub marks a missing label with -1.
        column = dataclasses.replace(
            column, cells=[None if cell is None or cell < 0 else cell for cell in column.cells]
        )
    column.require()
    numbers = not column.typed and all(NUMBER.fullmatch(cell.strip()) for cell in column.cells)
    words = []
    spelt: dict[str, dict[str, None]] = {}
    for row, cell in enumerate(column.cells):
        word = as_word(cell, numbers) if names is None else names[cell] if cell < len(names) else None
        if word is None:
            raise column.error(row, f"holds {shown(cell)}, which is no class; labels are words or whole numbers")
        words.append(word)
        spelt.setdefault(word, {})[repr(cell)] = None
    for word, ways in spelt.items():
        if len(ways) > 1:
            column.notes.append(
                f"{column.source}: labels written {' and '.join(list(ways)[:5])} are one class, {word!r}"
            )
    return words


def read_word_lists(column: Column, separator: str, what: str) -> list[list[str]]:
    """Read every cell as a list of words: a list, or text that is divided at a separator (a regular expression).

    Raises
    ------
    InputError
        Naming column and row of a cell that is neither, or of a list that holds something else.
    """
    found = []
    for row, cell in enumerate(column.cells):
        if isinstance(cell, str) and column.classes is None:
            cell = [part for part in re.split(separator, cell) if part.strip()]
        if not isinstance(cell, list | tuple):
            raise column.error(row, f"holds {shown(cell)}, which is no list of {what}; give a list of words")
        words = [_named(part, column.classes) for part in cell]
        if None in words:
            part = cell[words.index(None)]
            raise column.error(row, f"holds {shown(part)} in its list of {what}; these are words or whole numbers")
        found.append([str(word) for word in words])
    return found


def _named(part: Any, names: list[str] | None) -> str | None:
    if names is None:
        word = None if is_missing(part) else as_word(part, numbers=False)
        return word or None
    return names[part] if isinstance(part, int) and 0 <= part < len(names) else None


def read_numbers(column: Column) -> list[float]:
    """Read every cell as a number.

    Raises
    ------
    InputError
        Naming column and row of a cell that is missing or no finite number of float32.
    """
    column.require()
    if column.classes is not None:
        raise InputError(column.field, column.name, f"holds classes in {column.source}; name a column of numbers")
    found = []
    for row, cell in enumerate(column.cells):
        if isinstance(cell, str) and not column.typed and NUMBER.fullmatch(cell.strip()):
            cell = float(cell)
        if isinstance(cell, bool | str) or not isinstance(cell, int | float) or not abs(cell) < 3e38:
            raise column.error(row, f"holds {shown(cell)}, which is no number; fix it, or name a column of numbers")
        found.append(float(cell))
    return found


def as_word(label: Any, numbers: bool) -> str | None:
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
    return as_word(float(word), numbers)
