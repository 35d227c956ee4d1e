"""When the parts of a run's start began and ended, in all its processes.

Where the environment variable ``FEDLORA_TIMELINE`` names a file, every process appends a line of JSON to it for each
part: ``phase``, ``process`` (its id), and ``began`` and ``ended`` in seconds since the epoch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

FILE = "FEDLORA_TIMELINE"


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Note when what is inside begins and ends; also a decorator. Phases may hold others."""
    began = time.time()
    try:
        yield
    finally:
        if file := os.environ.get(FILE):
            line = {"phase": name, "process": os.getpid(), "began": began, "ended": time.time()}
            with open(file, "a", encoding="utf-8") as out:  # in one write, so that lines of processes do not mix
                out.write(json.dumps(line) + "\n")
