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


def beyond(values: Sequence[float], best: float) -> float | None:
    """Return the next candidate past the best one, or None if that is not the lowest or highest.

    The candidates' own spacing goes on: 0.01, 0.03, 0.1 is followed by 0.3.

    Parameters
    ----------
    values : sequence of int or float
        At least two candidates, all above 0.
    best : int or float
        One of them.
    """
    if best == max(values):
        nearest = sorted(values, reverse=True)
    elif best == min(values):
        nearest = sorted(values)
    else:
        return None
    # Two steps back and on again, since a ladder such as 1, 3, 10 has steps of two sizes.
    from_two_back = len(nearest) > 2
    next_one = best * nearest[1] / nearest[2] if from_two_back else best * best / nearest[1]
    if all(isinstance(value, int) for value in values):
        whole = round(next_one)
        return whole if whole > 0 and whole not in values else None
    return float(f"{next_one:.3g}")


def cost(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum the cost of tuning runs: runs, seconds, and bytes of all messages."""
    ways = ("initial_bytes", "downlink_bytes", "uplink_bytes")
    return {
        "runs": len(summaries),
        "seconds": sum(summary["seconds"]["total"] for summary in summaries),
        "bytes": sum(summary["communication"][way] for summary in summaries for way in ways),
    }
