"""Report the phases of this process (:mod:`fedlora.timeline`): in a log after a silence, or in a file for others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedlora.timeline import describe

DOING = ".doing"
"""The file of :func:`written`, or the end of its name."""

SILENCE = 6.0
"""Seconds without a line, after which a :class:`Teller` logs the current phase."""

_LONGEST = 500  # characters of another process's description
_REWRITTEN_AFTER, _OLD_AFTER = 5.0, 60.0  # seconds; an older file is of a process that has ended


class Teller:
    """Logs what this process does if nothing was logged for a while; a context manager.

    Parameters
    ----------
    log : callable (line)
    silence : float, optional
        Seconds without a line; :data:`SILENCE` by default.
    once : bool
        Log the same text only once: for processes that wait for hours.
    """

    def __init__(self, log: Callable[[str], None], silence: float | None = None, once: bool = False) -> None:
        self.log, self.once = log, once
        self.silence = SILENCE if silence is None else silence
        self._heard, self._last, self._ended = time.monotonic(), "", threading.Event()
        self._thread = threading.Thread(target=self._listen, name="teller", daemon=True)

    def heard(self) -> None:
        """Note that another line was logged."""
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
