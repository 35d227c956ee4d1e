"""Warnings of the clients' process: how they reach whoever runs the federation, each once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("fedlora")


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the library's warnings, for a process whose log nobody reads."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)


class Once(logging.Filter):
    """Lets every warning through once; in force inside a ``with``."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop a warning that was there before."""
        message = record.getMessage()
        new = record.levelno < logging.WARNING or message not in self._said
        self._said.add(message)
        return new

    def __enter__(self) -> Once:
        log.addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        log.removeFilter(self)
