"""Every CSV that is written, and those of ours that are read: no cell of text is a formula to a spreadsheet.

Labels, owners and names come from data files and from others. A spreadsheet runs a cell that begins with ``=``, and
some with ``+``, ``-``, ``@`` or a tab. Such a text gets an apostrophe in front, which says "text" to a spreadsheet;
numbers stay numbers.
"""

from __future__ import annotations

import csv
import io
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# Spreadsheets skip white space, and take the wide forms of the signs too.
_FORMULA = re.compile(r"'*([\s\x00\ufeff]*[=+\-@＝＋－＠]|[\t\r\n\x00])")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def text_cell(value: object) -> object:
    """Return a value as it goes into a cell: a text that a spreadsheet would run has an apostrophe in front."""
    if value is None or isinstance(value, numbers.Number):
        return value
    text = str(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def plain_cell(cell: str) -> str:
    """Return the text that :func:`text_cell` made a cell of."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def csv_lines(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> list[str]:
    """Return rows of CSV without their ends; a cell may hold line breaks, and is in quotes then."""
    return [_line([row.get(name) for name in columns]) for row in rows]


def table_csv(table: pd.DataFrame) -> str:
    """Return a table as CSV with its header, without its index; what is missing is an empty cell."""
    cells = table.astype(object).where(table.notna(), None)
    lines = [_line(list(table.columns)), *(_line(list(row)) for row in cells.itertuples(index=False, name=None))]
    return "".join(f"{line}\n" for line in lines)


def _line(cells: Sequence[object]) -> str:
    stream = io.StringIO()
    # Only what is in the line's end is put in quotes: a lone carriage return would begin a new row.
    csv.writer(stream, lineterminator="\r\n").writerow([text_cell(cell) for cell in cells])
    return stream.getvalue().removesuffix("\r\n")


def read_csv(text: str) -> list[dict[str, str]]:
    """Return the rows of a CSV of ours, its texts as they were.

    Raises
    ------
    csv.Error
        If it is damaged.
    """
    rows: Iterable[dict[str, str]] = csv.DictReader(io.StringIO(text, newline=""))
    return [{name: plain_cell(cell) if isinstance(cell, str) else cell for name, cell in row.items()} for row in rows]
