"""Choose a tuned value by the validation metrics of the tuning runs' last round. Test data is never used."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.tasks import Task

Metrics = Mapping[str, float | None]
"""Metrics by name; None for a number that is not finite."""


def validation_score(folder: Path) -> Metrics:
    """Return the validation metrics of a tuning run's last round: loss, and the scores of its task."""
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    metrics: Metrics = json.loads(lines[-1])["metrics"]["validation"]
    return metrics


def choose(scores: Sequence[Sequence[Metrics | None]], task: Task) -> int | None:
    """Return the index of the best candidate: by the task's primary metric, then the lowest loss, then the first.

    Both are means over the candidate's runs. A candidate of which a run failed is not chosen.

    Parameters
    ----------
    scores : sequence of sequence of mapping or None
        Of each candidate, the validation metrics of its runs; None for a run that failed.
    task : Task
    """

    def rank(place: int) -> tuple[float, float]:
        found = [metrics for metrics in scores[place] if metrics is not None]
        losses = [math.inf if (loss := metrics["loss"]) is None else loss for metrics in found]
        loss = statistics.fmean(losses)
        return statistics.fmean(map(task.score, found)), -loss if math.isfinite(loss) else -math.inf

    there = [place for place, runs in enumerate(scores) if all(metrics is not None for metrics in runs)]
    return max(there, key=rank, default=None)


def cost(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum the cost of tuning runs: runs, seconds, and bytes of all messages."""
    ways = ("initial_bytes", "downlink_bytes", "uplink_bytes")
    return {
        "runs": len(summaries),
        "seconds": sum(summary["seconds"]["total"] for summary in summaries),
        "bytes": sum(summary["communication"][way] for summary in summaries for way in ways),
    }
