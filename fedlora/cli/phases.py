"""What a command does at the moment: a live picture on a terminal, else a line where nothing was said for a while."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedlora.errors import plain_text
from fedlora.status import Teller
from fedlora.timeline import active, format_clock, format_seconds

_LONGEST_LINE = 20_000  # characters


class PhaseDisplay:
    """Shows the phases that are active, while the code inside a ``with`` works.

    Parameters
    ----------
    console : Console
    silence : float, optional
        Seconds without a line, after which one is printed; infinite for none. ``status.SILENCE`` by default. On a
        terminal every phase is seen at all times instead.
    log : callable (line), optional
        Prints that line instead of :meth:`say`, the same only once.

    Attributes
    ----------
    note : str
        Shown below the phases.
    """

    def __init__(
        self, console: Console, silence: float | None = None, log: Callable[[str], None] | None = None
    ) -> None:
        self.console, self.note = console, ""
        self._teller = Teller(log or self.say, silence, once=log is not None)
        self._shown: Live | Teller = self._teller
        if console.is_terminal and not console.is_dumb_terminal:
            self._shown = Live(console=console, get_renderable=self._picture, refresh_per_second=4, transient=True)

    def __enter__(self) -> PhaseDisplay:
        self._shown.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.__exit__(None, None, None)

    def say(self, line: str) -> None:
        """Print a line, above the phases."""
        self._teller.heard()
        # Without wrapping or markup: a path may be wider than the terminal, and contain brackets.
        self.console.print(plain_text(line, _LONGEST_LINE), markup=False, highlight=False, soft_wrap=True)

    def _picture(self) -> Group:
        table, details = Table.grid(padding=(0, 2)), []
        table.add_column(no_wrap=True, overflow="ellipsis")
        for _ in range(4):
            table.add_column(justify="right", no_wrap=True)
        for each in active():
            left, total = each.left, each.total
            bar = ProgressBar(total, min(each.done, total), width=20) if total else ""
            shown_left = "" if left is None or each.done >= total else f"{format_seconds(left)} left"
            table.add_row(Text(each.shown), bar, each.count, format_clock(each.seconds), shown_left)
            if each.detail is not None and (detail := each.detail()):
                details.append(f"{each.shown}: {detail}")
        lines = (*details, self.note) if self.note else details
        return Group(table, *(Text(plain_text(line), no_wrap=True, overflow="ellipsis") for line in lines))
