"""Which columns of a file ``fedlora init`` takes for the texts and the labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fedlora.assets import is_asset
from fedlora.data.columns import read_column, read_owners, read_texts
from fedlora.data.files import Table
from fedlora.data.origins import load_headers, load_tables
from fedlora.errors import InputError
from fedlora.paths import find_path
from fedlora.summaries import format_count
from fedlora.tasks.labels import as_word, is_missing

NONE = "none"
"""The answer for no column."""
_TEXTS = ("text", "sentence", "review", "content", "body", "message", "comment", "document")
_LABELS = ("label", "labels", "class", "category", "target", "sentiment", "verdict", "rating", "stars", "score")
"""Names by which a column is taken for the texts or the labels, in this order."""
_MOST_CLASSES = 50
_ROWS_A_CLASS = 5
"""A column of another name may be the labels with 2 to 50 values, each in five rows on average."""


@dataclass(frozen=True)
class Columns:
    """The columns of a source.

    Parameters
    ----------
    table : Table
        Without rows, where only the names are known.
    source : str
        What the user calls it.
    """

    table: Table
    source: str

    @property
    def names(self) -> list[str]:
        """All names, in the file's order."""
        return list(self.table.columns)

    @property
    def about(self) -> str:
        """Numbers of rows, if it is known, and the names."""
        rows = f"{format_count(self.table.rows, 'row')}, " if self.table.rows else ""
        return f"{rows}columns {', '.join(self.names)}"

    def texts(self, name: str) -> str:
        """Return the name of a column of texts; raise InputError if it is none."""
        read_texts(self.table, name, "--text", self.source)
        return name

    def label(self, name: str, text: str) -> str:
        """Return the name of a column of labels beside the texts, or none.

        Raises
        ------
        InputError
            If there is no such column, or nothing to learn from it: it is the texts', empty, or all its labels are one.
        """
        if name == NONE:
            return name
        remedy = f"name another column, or {NONE}"
        if name == text:
            raise InputError("--label", name, f"is the column of the texts; {remedy}")
        if not self.values(name, "--label") and self.table.rows:
            raise InputError("--label", name, f"is an empty column; {remedy}")
        classes = self.classes(name, "--label")
        if len(classes) == 1:
            raise InputError("--label", name, f"has one class, {classes[0]!r}, so there is nothing to learn; {remedy}")
        return name

    def owner(self, name: str) -> str:
        """Return the name of a column that says whose each row is; raise InputError if it does not."""
        read_owners(self.table, name, range(self.table.rows), self.source, "--owner")
        return name

    def values(self, name: str, option: str) -> list[object]:
        """Return a column's values without empty cells; raise InputError, naming the option, if it cannot be read."""
        return [value for value in read_column(self.table, name, option) if not is_missing(value)]

    def classes(self, name: str, option: str) -> list[str]:
        """Return the distinct values of a column in words, sorted; what is neither a word nor a number is left out."""
        values = self.values(name, option)
        found = (as_word(value, numbers=False) or (isinstance(value, float) and str(value)) for value in values)
        return sorted({word for word in found if word})

    def text(self, taken: Collection[str | None]) -> str:
        """Guess the texts: the column of a usual name, else the one with the longest texts.

        Parameters
        ----------
        taken : Collection of str
            Columns that are something else.
        """
        others = [name for name in self.names if name not in taken]
        usual = _first(_TEXTS, others)
        return usual or max(others or self.names, key=self._length, default="text")

    def usual_label(self, taken: Collection[str | None]) -> str:
        """Return the column that has a usual name of labels; "" if none has."""
        return _first(_LABELS, [name for name in self.names if name not in taken])

    def labels(self, taken: Collection[str | None]) -> list[str]:
        """Guess the labels: the column of a usual name, else all that have few values; ``taken`` as for the texts."""
        others = [name for name in self.names if name not in taken]
        usual = self.usual_label(taken)
        return [usual] if usual else [name for name in others if self._has_classes(name)]

    def _length(self, name: str) -> int:
        if name in self.table.repeated:
            return 0
        return sum(len(value) for value in self.values(name, "--text") if isinstance(value, str))

    def _has_classes(self, name: str) -> bool:
        if name in self.table.repeated:
            return False
        values = self.values(name, "--label")
        if not all(isinstance(value, str | int | float) for value in values):
            return False
        return 2 <= len(set(values)) <= min(_MOST_CLASSES, len(values) // _ROWS_A_CLASS)


def find_columns(source: str) -> Columns | None:
    """Return the columns of a file or a folder, or their names of an asset; None where the source has to be fetched.

    Raises
    ------
    InputError
        If there is no such source, or it cannot be read.
    """
    here = not is_asset(source) and find_path(source, "--data") is not None
    splits = load_tables(source, "--data") if here else load_headers(source, "--data", set())
    if splits is None:
        return None
    return Columns(splits.get("train", next(iter(splits.values()))), source)


def _first(usual: Sequence[str], names: Collection[str]) -> str:
    """Return the first of the usual names that is a column; "" if none is."""
    lower = {name.lower(): name for name in names}
    return next((lower[name] for name in usual if name in lower), "")
