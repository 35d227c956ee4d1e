"""Tables on a terminal, and in a pipe or a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedlora.errors import plain_text

_LONGEST_CELL = 20_000  # characters
_GAP = "  "


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[str] = (),
    whole: bool = False,
) -> None:
    """Print a table.

    On a terminal long cells are wrapped. In a pipe or a file every row is one line, and no cell is cut: there is no
    width that they have to fit in.

    Parameters
    ----------
    console : Console
    headings : sequence of str
    rows : sequence of sequence of str
        Their cells may come from somebody else; a row may have fewer than there are headings.
    right : Collection of str
        Headings of the columns that are aligned at the right, such as numbers.
    whole : bool
        Let every row be one line on a terminal too, for tables of short cells.
    """
    cells = [[" ".join(plain_text(cell, _LONGEST_CELL).splitlines()) for cell in row] for row in rows]
    if whole or not is_terminal(console):
        for line in aligned([headings, *cells], [heading in right for heading in headings]):
            print_line(console, line)
        return
    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        side = "right" if heading in right else "left"
        table.add_column(escape(heading), justify=side, no_wrap=not number, overflow="fold")  # type: ignore[arg-type]
    for row in cells:
        table.add_row(*map(escape, row))
    console.print(table)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Return the lines of a table; ``right`` says of each column whether it is aligned at the right."""
    widths = [max((cell_len(row[i]) for row in rows if i < len(row)), default=0) for i in range(len(right))]
    lines = []
    for row in rows:
        spaces = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=False)]
        padded = (space + cell if at else cell + space for cell, space, at in zip(row, spaces, right, strict=False))
        lines.append(_GAP.join(padded).rstrip())
    return lines


def print_line(console: Console, line: str) -> None:
    """Print a line as it is: without wrapping or markup, since a path may be long, and contain brackets."""
    console.print(plain_text(line, _LONGEST_CELL * 10), markup=False, highlight=False, soft_wrap=True)


def is_terminal(console: Console) -> bool:
    """Whether somebody looks at what is printed; colours that FORCE_COLOR asks for make no terminal of a pipe."""
    return console.is_terminal and console.file.isatty()
