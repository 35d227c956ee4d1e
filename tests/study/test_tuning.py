"""The choice of a tuned value."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.study.tuning import beyond, choose
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


@pytest.mark.parametrize(
    ("values", "best", "expected"),
    [
        ([0.01, 0.03, 0.1], 0.1, 0.3),
        ([0.01, 0.03, 0.1], 0.01, 0.003),
        ([0.1, 0.01, 0.03], 0.1, 0.3),
        ([0.01, 0.03, 0.1], 0.03, None),
        ([0.5, 1.0], 1.0, 2.0),
        ([4, 8, 16], 16, 32),
        ([4, 8], 4, 2),
        ([1, 2], 1, None),  # nothing whole lies below 1
    ],
)
def test_the_candidates_spacing_goes_on_beyond_an_edge(
    values: list[float], best: float, expected: float | None
) -> None:
    assert beyond(values, best) == expected


@given(
    values=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=6, unique_by=lambda value: f"{value:.3g}"),
    data=st.data(),
)
def test_a_further_candidate_lies_outside_of_all(values: list[float], data: st.DataObject) -> None:
    values = [float(f"{value:.3g}") for value in values]
    best = data.draw(st.sampled_from([min(values), max(values)]))
    value = beyond(values, best)
    assert value is not None
    assert value > max(values) if best == max(values) else 0 < value < min(values)
