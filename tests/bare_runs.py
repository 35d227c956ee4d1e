"""Runs of a test without what takes longer than they do: pictures, collecting garbage, and waiting for the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest


@contextmanager
def bare_runs() -> Iterator[pytest.MonkeyPatch]:
    """Let runs in this process draw no pictures, collect no garbage and not flush the disk; yield what undoes it."""
    with pytest.MonkeyPatch.context() as patch:
        for function in ("plot_rounds", "plot_by_domain", "plot_partition"):
            patch.setattr(f"fedlora.strategies.callbacks.{function}", lambda *_: None)
        patch.setattr("fedlora.simulator._settled_heap", nullcontext)
        patch.setattr("fedlora.results.checkpoint._SYNCHRONOUS", "OFF")
        yield patch
