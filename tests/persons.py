"""Examples of persons, of whom one has very many."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

HEAVY = "zoe"
SIZES = {HEAVY: 500, **{f"p{number:02}": 1 + number % 6 for number in range(40)}}
"""Examples by person."""


def write_persons(path: Path, sizes: Mapping[str, int] = SIZES, seed: int = 0) -> Path:
    """Write examples of the tiny tokenizer's words as JSON lines, shuffled.

    ``author`` is the person, ``clinic`` where most of their examples lie: those of one person in six are at both.
    """
    random = np.random.default_rng(seed)
    rows = []
    for number, (author, count) in enumerate(sizes.items()):
        for example in range(count):
            words = " ".join(f"w{word}" for word in random.integers(4, 50, random.integers(3, 9)))
            clinic = (number + example) % 2 if number % 6 == 5 else number % 2
            rows.append({"text": words, "label": int(random.integers(3)), "author": author, "clinic": f"c{clinic}"})
    random.shuffle(rows)  # type: ignore[arg-type]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
