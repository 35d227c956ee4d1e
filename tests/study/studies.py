"""Studies for tests: small ones without data, and one of the real MiniLM's first layer that takes seconds a run."""

from __future__ import annotations

import copy
from typing import Any

from tests.configs import BASE

PRIVATE = {"mode": "example", "target_epsilon": 8.0, "target_delta": 1e-3}

TINY: dict[str, Any] = {
    "study": {"name": "tiny"},
    "base": {
        "run": {"rounds": 2},
        "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 16, "num_hidden_layers": 1},
        "data": {
            "name": "asset:rotten-tomatoes",
            "seed": 7,
            "validation": 0.005,
            "max_examples": 120,
            "max_test_examples": 30,
            "partition": {"kind": "dirichlet", "alpha": 5.0, "clients": 3, "min_examples": 20},
        },
        "method": {"name": "fed-sb", "rank": 4},
        "client": {"batch_size": 8, "local_steps": 2},
        "privacy": PRIVATE,
        "server": {"fraction_train": 0.67},
    },
    "axes": {"method.name": ["ffa-lora", "fed-sb"], "run.seed": [0, 1]},
    "tuning": {"values": [0.02, 0.06]},
    "budget": {"runs": 2, "memory_per_run": 1.0},
}


def planned(**sections: Any) -> dict[str, Any]:
    """Return a study of the smallest base config; ``axes={...}`` and the like add to it."""
    return {"base": copy.deepcopy(BASE), **sections}


def tiny(**sections: Any) -> dict[str, Any]:
    """Return the study that runs, with sections replaced."""
    return copy.deepcopy({**TINY, **sections})
