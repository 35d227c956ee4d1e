"""Measure each run in a process of its own, so that no run's memory or caches reach another's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def run_module(module: str, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run a module of Python, and return the JSON object that it prints on its last line.

    Parameters
    ----------
    module : str
    arguments : sequence of str
    seconds : float
        A run that takes longer is ended.

    Returns
    -------
    dict
        What was printed; or ``error``, the end of what it wrote to stderr.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {seconds:g} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": " / ".join(done.stderr.strip().splitlines()[-3:])[-600:] or "no output"}
    return found
