"""Output of a run: a table of rounds, and the result."""

from __future__ import annotations

from typing import Any

from fedlora.cli.formats import COLUMNS, header, result_lines, round_cells, round_lines
from fedlora.cli.phases import PhaseDisplay
from fedlora.results.finished import RunResult
from fedlora.strategies.callbacks import Progress
from fedlora.tasks import Task


class RunDisplay:
    """Prints the rounds of a run.

    Parameters
    ----------
    phases : PhaseDisplay
        Shows what goes on between them.
    task : Task
        The run's task, which formats its scores.

    Attributes
    ----------
    progress : fedlora.strategies.callbacks.Progress
        Hooks for :func:`fedlora.simulate`.
    """

    def __init__(self, phases: PhaseDisplay, task: Task) -> None:
        self.phases, self.task = phases, task
        self.progress = Progress(on_start=self._start, on_round=self._round, on_note=phases.say)
        self._started = self._header_shown = False

    def summary(self, result: RunResult) -> None:
        """Print the result, and the folder that holds it."""
        if not self._started:
            self.phases.say("finished already; nothing was left to do")
        for line in result_lines(result.summary, self.task, result.folder):
            self.phases.say(line)

    def _start(self, rounds: int, first: int, clients: int) -> None:
        self._started = True

    def _round(self, line: dict[str, Any]) -> None:
        if not self._header_shown:
            self._header_shown = True
            self.phases.say(header())
        for text in round_lines(line, self.task):
            self.phases.say(text)
        cells = dict(zip((name for name, _ in COLUMNS), round_cells(line, self.task), strict=True))
        last = f"loss {cells['train loss']}  score {cells['score']}  epsilon {cells['epsilon']}  sent {cells['sent']}"
        self.phases.note = last
