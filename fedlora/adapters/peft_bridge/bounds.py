"""Runs PEFT's code quietly, from a seed, and within bounds."""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import numpy as np
import torch


@contextmanager
def quiet() -> Iterator[None]:
    # Some types show a progress bar.
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let all that draws at random draw from a seed, and put back the generators afterwards."""
    chance = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(chance[0])
            np.random.set_state(chance[1])
