"""What a process does at the moment, with counts and estimates, and when the parts of a run began and ended.

Work announces itself with :func:`phase` where it is done. A display asks :func:`active`, a log has a :class:`Teller`,
and a process without either keeps a file up to date for the displays of others (:func:`written`, :func:`read_written`).

Where the environment variable ``FEDLORA_TIMELINE`` names a file, every process appends a line of JSON to it for each
phase: ``phase``, ``process`` (its id), and ``began`` and ``ended`` in seconds since the epoch.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

FILE = "FEDLORA_TIMELINE"

DOING = ".doing"
"""The file of :func:`written`, or the end of its name."""

_TIMED_AFTER = 5.0
"""Seconds after which a phase tells how long it takes, where it cannot tell how long it will take."""

_LONGEST = 500  # characters of another process's description
_REWRITTEN_AFTER, _OLD_AFTER = 5.0, 60.0  # seconds; what writes no more has ended

SILENCE = 8.0
"""Seconds without a line, after which a :class:`Teller` says what goes on."""


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


class Teller:
    """Says what this process does where nothing was said for a while; inside a ``with``.

    Parameters
    ----------
    log : callable (line)
    silence : float, optional
        Seconds without a line; :data:`SILENCE` by default.
    once : bool
        Say the same only once: for processes that wait for hours, of which the last line in the log says so.
    """

    def __init__(self, log: Callable[[str], None], silence: float | None = None, once: bool = False) -> None:
        self.log, self.once = log, once
        self.silence = SILENCE if silence is None else silence
        self._heard, self._last, self._ended = time.monotonic(), "", threading.Event()
        self._thread = threading.Thread(target=self._listen, name="teller", daemon=True)

    def heard(self) -> None:
        """Take note of a line that somebody else said."""
        self._heard = time.monotonic()

    def __enter__(self) -> Teller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._ended.wait(min(0.25, self.silence)):
            silent = time.monotonic() - self._heard >= self.silence
            if silent and (text := describe()) and not (self.once and text == self._last):
                self._last = text
                self.heard()
                self.log(text)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Keep a file with what this process does, for :func:`read_written` in others, until the end of what is inside.

    A file that cannot be written, such as in a folder that is not there yet, is tried again soon.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_write, args=(path, ended), name="doing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _write(path: Path, ended: threading.Event) -> None:
    last, when, temporary = None, 0.0, path.with_name(f"{path.name}.{os.getpid()}")
    over = False
    while not over:
        if (text := describe()) != last or time.monotonic() - when > _REWRITTEN_AFTER:
            with suppress(OSError):
                temporary.write_text(f"{text}\n", encoding="utf-8")
                os.replace(temporary, path)
                last, when = text, time.monotonic()
        over = ended.wait(0.5)


def read_written(path: Path) -> str:
    """Return what a process of :func:`written` does; empty where there is no such file, or it wrote a minute ago."""
    try:
        if time.time() - path.stat().st_mtime > _OLD_AFTER:
            return ""
        return path.read_bytes()[: 4 * _LONGEST].decode("utf-8", "replace").strip()[:_LONGEST]
    except OSError:
        return ""
