"""Phases: what a process does at the moment, with counts and estimates, and when each phase began and ended.

Work announces itself with :func:`phase` where it is done. Displays ask :func:`active`; :mod:`fedlora.status` reports to
logs and to other processes.

Where the environment variable ``FEDLORA_TIMELINE`` names a file, every process appends a line of JSON to it for each
phase: ``phase``, ``process`` (its id), and ``began`` and ``ended`` in seconds since the epoch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

FILE = "FEDLORA_TIMELINE"

_TIMED_AFTER = 5.0
"""Seconds after which a phase shows how long it has taken, if it cannot estimate how long it will take."""


@dataclass(eq=False)
class Phase:
    """Something that takes time.

    Attributes
    ----------
    shown : str
        What it is, in the words that displays show.
    total, done : int
        How many parts it has, and how many are done; total is 0 where nothing is counted.
    detail : callable () -> str, optional
        Describes what other processes do for it.
    """

    shown: str
    total: int = 0
    done: int = 0
    detail: Callable[[], str] | None = None

    def __post_init__(self) -> None:
        self._began, self._first = time.monotonic(), self.done

    def advance(self, number: int = 1) -> None:
        """Count parts as done."""
        self.done += number

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float | None:
        """Seconds until its end, if the other parts take as long as those that are done; None before the first."""
        counted = self.done - self._first
        return self.seconds / counted * max(0, self.total - self.done) if counted > 0 else None

    @property
    def count(self) -> str:
        """``done/total``; empty where nothing is counted."""
        return f"{self.done:,}/{self.total:,}" if self.total else ""

    def describe(self) -> str:
        """Return what it is, how far it is and how long it will take, and what others do for it."""
        left, detail = self.left, "" if self.detail is None else self.detail()
        text = f"{self.shown} {self.count}".rstrip()
        if left is not None and self.done < self.total:
            text += f" ({format_seconds(left)} left)"
        elif not detail and self.seconds >= _TIMED_AFTER:
            text += f" ({format_clock(self.seconds)})"
        return f"{text}: {detail}" if detail else text


_active: list[Phase] = []


@contextmanager
def phase(
    name: str, shown: str = "", total: int = 0, done: int = 0, detail: Callable[[], str] | None = None
) -> Iterator[Phase]:
    """Announce what is inside; also a decorator. Phases may hold others.

    Parameters
    ----------
    name : str
        For the timeline's file.
    shown : str
        For displays; they do not show a phase without it.
    total, done, detail
        As :class:`Phase` has them.
    """
    here, began = Phase(shown, total, done, detail), time.time()
    if shown:
        _active.append(here)
    try:
        yield here
    finally:
        if shown:
            _active.remove(here)
        if file := os.environ.get(FILE):
            line = {"phase": name, "process": os.getpid(), "began": began, "ended": time.time()}
            with open(file, "a", encoding="utf-8") as out:  # in one write, so that lines of processes do not mix
                out.write(json.dumps(line) + "\n")


def active() -> list[Phase]:
    """Return the phases of this process that displays show, in the order in which they began."""
    return list(_active)


def describe() -> str:
    """Return in one line what this process does; empty where no phase is active."""
    return ", ".join(each.describe() for each in active())


def format_seconds(seconds: float) -> str:
    """Return a duration in one unit: 40 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def format_clock(seconds: float) -> str:
    """Return a duration to the second: 0:40, 3:05, 2:30:00."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
