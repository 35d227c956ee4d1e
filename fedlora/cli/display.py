"""Terminal output of a run: a progress bar and a table of rounds. Without a terminal, only the table."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedlora.cli.formats import COLUMNS, header, result_lines, round_cells, round_lines
from fedlora.errors import plain_text
from fedlora.results.finished import RunResult
from fedlora.strategies.callbacks import Progress as Hooks
from fedlora.tasks import Task

_LONGEST_LINE = 20_000  # characters


class RunDisplay:
    """Shows the progress of a run.

    Parameters
    ----------
    console : Console
    task : Task
        The run's task, which formats its scores.

    Attributes
    ----------
    progress : fedlora.strategies.callbacks.Progress
        Hooks for :func:`fedlora.simulate`.
    """

    def __init__(self, console: Console, task: Task) -> None:
        self.console, self.task = console, task
        self.progress = Hooks(on_start=self._start, on_client=self._client, on_round=self._round, on_note=self._print)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._clients_a_round = 0
        self._started = self._header_shown = False

    def __enter__(self) -> RunDisplay:
        self._bar.start()
        self._rounds = self._bar.add_task("starting", total=None, note="")
        self._clients = self._bar.add_task("clients", total=None, note="", visible=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def summary(self, result: RunResult) -> None:
        """Print the result, and the folder that holds it."""
        if not self._started:
            self._print("finished already; nothing was left to do")
        for line in result_lines(result.summary, self.task, result.folder):
            self._print(line)

    def _start(self, rounds: int, first: int, clients: int) -> None:
        self._started = True
        self._clients_a_round = clients
        self._bar.update(self._rounds, description="rounds", total=rounds, completed=first)
        self._bar.update(self._clients, total=clients, completed=0, visible=True)

    def _client(self, client: int) -> None:
        self._bar.advance(self._clients)

    def _round(self, line: dict[str, Any]) -> None:
        if not self._header_shown:
            self._header_shown = True
            self._print(header())
        for text in round_lines(line, self.task):
            self._print(text)
        cells = dict(zip((name for name, _ in COLUMNS), round_cells(line, self.task), strict=True))
        note = f"loss {cells['train loss']}  score {cells['score']}  epsilon {cells['epsilon']}  sent {cells['sent']}"
        self._bar.update(self._rounds, completed=line["round"], note=note)
        self._bar.reset(self._clients, total=self._clients_a_round)

    def _print(self, line: str) -> None:
        # Without wrapping or markup: a path may be wider than the terminal, and contain brackets.
        self.console.print(plain_text(line, _LONGEST_LINE), markup=False, highlight=False, soft_wrap=True)
