"""What a study's plan adds to its runs: how learning rates were chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def tuning(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Return what studies chose before they compared."""
    return []
