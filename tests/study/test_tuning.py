"""The choice of a tuned value."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.study.tuning import choose
from fedlora.tasks import get_task

NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([None, {"accuracy": 0.6, "loss": 0.5}, {"accuracy": 0.7, "loss": 0.9}], 2),
        ([{"accuracy": 0.6, "loss": 0.5}, {"accuracy": 0.6, "loss": 0.4}, {"accuracy": 0.6, "loss": 0.4}], 1),
        # A loss that diverged is null in rounds.jsonl.
        ([{"perplexity": None, "loss": None}, {"perplexity": 20.0, "loss": 3.0}], 1),
        ([{"accuracy": 0.6, "loss": NAN}, {"accuracy": 0.6, "loss": 9.0}], 1),
        ([None, {"accuracy": 0.6, "loss": None}], 1),
        ([None, None], None),
    ],
)
def test_the_best_has_the_highest_accuracy_then_the_lowest_loss(scores: list[Any], best: int | None) -> None:
    task = get_task("causal-lm" if any(s and "perplexity" in s for s in scores) else "sequence-classification")
    assert choose([[score] for score in scores], task) == best


def test_the_mean_over_seeds_decides_and_a_failed_run_leaves_its_candidate_out() -> None:
    def runs(*accuracies: float | None) -> list[Any]:
        return [None if a is None else {"accuracy": a, "loss": 0.5} for a in accuracies]

    task = get_task("sequence-classification")
    assert choose([runs(0.9, 0.5, 0.5), runs(0.7, 0.7, 0.6), runs(0.9, 0.9, None)], task) == 1
    assert choose([runs(0.9, None), runs(None, 0.9)], task) is None
