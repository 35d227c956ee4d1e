"""The round that validation prefers: its model is kept beside the last round's, and early stopping goes by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedlora.communication.wire import decode
from fedlora.methods import BEST
from fedlora.strategies.callbacks import Callback, Outcome
from fedlora.tasks import Task

if TYPE_CHECKING:
    from fedlora.strategies.federation import Federation

_RESIDUAL = "best residual"
"""Name of the sum of increments of that round in the checkpoint, whose arrays are named as the folder is."""


class KeepBest(Callback):
    """Keeps the arrays of the best round so far in the checkpoint, in the transaction of that round.

    What is the best follows from the lines of rounds.jsonl alone, so that a resumed run goes on as if it had never
    stopped. A run without validation has no best round, since choosing on test examples would flatter.

    Parameters
    ----------
    task : Task
        Says by which metric rounds are compared.
    patience : int, optional
        Evaluations without a better one that end the run; by default nothing does.

    Attributes
    ----------
    round : int or None
        The first of the best rounds.
    since : int
        Evaluations after it.
    """

    def __init__(self, task: Task, patience: int | None = None) -> None:
        self.task, self.patience = task, patience
        self.round: int | None = None
        self.since = 0
        self._score = 0.0

    @property
    def stops(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.since >= self.patience

    def see(self, server_round: int, metrics: Mapping[str, Any]) -> None:
        """Compare a round's metrics with the best before."""
        if "validation" not in metrics:
            return
        score = self.task.score(metrics["validation"])
        if self.round is None or score > self._score:
            self.round, self.since, self._score = server_round, 0, score
        else:
            self.since += 1

    def on_start(self, federation: Federation) -> None:
        """See the rounds before this process."""
        for line in federation.folder.rounds():
            self.see(line["round"], line["metrics"])

    def on_round(self, federation: Federation, outcome: Outcome) -> None:
        """Put the arrays of a new best round into the checkpoint, in place of those before."""
        if self.round != outcome.round:
            return
        saved = federation.checkpoint
        saved[BEST] = outcome.round
        saved.set_arrays(BEST, decode(federation.arrays))
        saved.set_arrays(_RESIDUAL, federation.residual)

    def export(self, federation: Federation) -> None:
        """Write the model of the best round into best/; the federation's own is the same afterwards."""
        saved, method, adapted = federation.checkpoint, federation.method, federation.adapted
        if self.round is None or saved.get(BEST) != self.round:  # a run of a version that kept none
            return
        replied = method.replied
        method.replied = {r: clients for r, clients in replied.items() if r <= self.round}
        adapted.set_shared(saved.get_arrays(BEST) or {})
        adapted.set_residual(saved.get_arrays(_RESIDUAL) or {})
        method.export(adapted, federation.data, federation.folder.path / BEST)
        method.replied = replied
        federation.show()
