"""Callbacks for everything beside training and aggregation, called in the order of the federation's list."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from fedlora.communication.links import link_seed, network_profile, round_network
from fedlora.communication.meter import Row
from fedlora.data.partition_plot import plot_partition
from fedlora.results.plot import plot_by_domain, plot_rounds
from fedlora.results.tracking import Tracker, open_trackers, scalars
from fedlora.strategies.base import RoundReport
from fedlora.strategies.lost_replies import attempt_rows
from fedlora.tasks import get_task

if TYPE_CHECKING:
    from fedlora.strategies.federation import Federation

log = logging.getLogger("fedlora")


@dataclass
class Progress:
    """What a progress display may show; every hook does nothing by default.

    Attributes
    ----------
    on_start : callable (rounds, first round, clients a round)
    on_client : callable (client)
    on_round : callable (line of rounds.jsonl)
    on_note : callable (text)
        What a server tells, such as which nodes do not take part.
    """

    on_start: Callable[[int, int, int], None] = lambda rounds, first, clients: None
    on_client: Callable[[int], None] = lambda client: None
    on_round: Callable[[dict[str, Any]], None] = lambda line: None
    on_note: Callable[[str], None] = lambda text: None


@dataclass
class Outcome:
    """One finished round.

    Attributes
    ----------
    round : int
    line : dict
        Of rounds.jsonl; callbacks before the checkpoint may add to it.
    rows : list of Row
        Of communication.csv.
    reports : list of RoundReport
        Of the round's exchanges.
    """

    round: int
    line: dict[str, Any]
    rows: list[Row]
    reports: list[RoundReport] = field(default_factory=list)


class Callback:
    """Base class of callbacks. Every hook does nothing by default."""

    def on_start(self, federation: Federation) -> None:
        """Before the first round of this process."""

    def on_round(self, federation: Federation, outcome: Outcome) -> None:
        """After a round."""

    def on_end(self, federation: Federation) -> None:
        """After the last round, once the result is exported."""

    def close(self, federation: Federation) -> None:
        """At the end of this process's part, also if the run was stopped."""


class Network(Callback):
    """Adds what the round's messages would take on simulated links."""

    def on_round(self, federation: Federation, outcome: Outcome) -> None:
        """Add ``network`` to the line."""
        config = federation.config
        profile = network_profile(config.network)
        seconds = None if profile is None else round_network(outcome.rows, profile, link_seed(config))
        outcome.line["network"] = seconds


class Saved(Callback):
    """Writes the round into the checkpoint and the run folder: it is there whole, or not at all."""

    def on_round(self, federation: Federation, outcome: Outcome) -> None:
        """Write what a resumed run starts from, and the round's lines."""
        federation.save(outcome.round)
        federation.folder.add_round(outcome.line, *attempt_rows(outcome.round, outcome.rows, outcome.reports))


class Trackers(Callback):
    """Passes each round on to the loggers that ``[tracking]`` names; one that fails later does not end the run."""

    def __init__(self) -> None:
        self._trackers: list[Tracker] = []

    def on_start(self, federation: Federation) -> None:
        """Open them; they do not learn the federation's key, which names what clients keep."""
        key = hashlib.sha256(f"tracking {federation.roster.federation}".encode()).hexdigest()[:32]
        for tracker in open_trackers(federation.config, federation.folder.path, key):
            self._trackers.append(tracker)

    def on_round(self, federation: Federation, outcome: Outcome) -> None:
        """Log the line's numbers."""
        numbers = scalars(outcome.line)
        for tracker in self._trackers:
            self._try(tracker, partial(tracker.log, outcome.round, numbers))

    def close(self, federation: Federation) -> None:
        """Close them."""
        for tracker in self._trackers:
            self._try(tracker, partial(tracker.close, federation.folder.finished))

    def _try(self, tracker: Tracker, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever the package raises
            log.warning("tracking.%s fails: %s", tracker.name, " ".join(str(error).split()))


class Display(Callback):
    """Feeds a progress display.

    Parameters
    ----------
    progress : Progress
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_start(self, federation: Federation) -> None:
        """Say how many rounds there are."""
        done, rounds = federation.done, federation.config.run.rounds
        self.progress.on_start(rounds, done, len(federation.method.sample(done + 1)))

    def on_round(self, federation: Federation, outcome: Outcome) -> None:
        """Show the line."""
        self.progress.on_round(outcome.line)


class Plot(Callback):
    """Draws partition.png, rounds.png and, where a run scores domains, domains.png."""

    def on_round(self, federation: Federation, outcome: Outcome) -> None:
        """Draw who trains on what; after a round, since drawing would delay the first."""
        self._partition(federation)

    def on_end(self, federation: Federation) -> None:
        """Draw the whole run."""
        self._partition(federation)
        folder, config = federation.folder, federation.config
        title, task = f"{config.run.name} · {federation.method.title}", get_task(config.model.task)
        lines, start = folder.rounds(), folder.checkpoint.get("start")
        plot_rounds(folder.path / "rounds.png", lines, title, task, start, config.privacy.target_epsilon)
        plot_by_domain(folder.path / "domains.png", lines[-1]["metrics"], title, task, start)

    def _partition(self, federation: Federation) -> None:
        """Draw who trains on what, where that is known, once."""
        file, data = federation.folder.path / "partition.png", federation.data
        if federation.simulated and not file.exists():
            plot_partition(file, data.label_counts(), data.counted_names, data.client_names)
