"""Differences by seed, against scipy and by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedlora.reporting.comparison import Comparison, compare
from fedlora.reporting.differences import differences, differences_table, holm, to_best
from fedlora.reporting.html import caveat
from fedlora.reporting.report import write_report
from fedlora.reporting.runs import read_runs
from tests.reporting.test_budgets import ROUNDS, write

FINAL = ROUNDS - 1


def make(folder: Path, scores: dict[tuple[str, int], float]) -> Comparison:
    """Runs of these final scores by method and seed."""
    for (method, seed), score in scores.items():
        values: list[float | None] = [0.5] * FINAL + [score]
        path = write(folder / f"{method}-{seed}", seed, values, config={"method.name": method, "method.rank": 4})
        summary = json.loads((path / "summary.json").read_text())
        summary["final"]["accuracy"] = score
        (path / "summary.json").write_text(json.dumps(summary))
    return compare(read_runs([folder]))


SCORES = {
    **{("fed-sb", seed): score for seed, score in enumerate([0.80, 0.78, 0.83, 0.79])},
    **{("fedit", seed): score for seed, score in enumerate([0.79, 0.77, 0.815, 0.78])},
    **{("ffa-lora", seed): score for seed, score in enumerate([0.70, 0.81, 0.60])},
}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return make(tmp_path_factory.mktemp("runs"), SCORES)


def test_every_pair_is_the_paired_t_test_on_common_seeds(comparison: Comparison) -> None:
    found = differences(comparison)
    assert [(d.first.method, d.second.method) for d in found] == [
        ("fed-sb", "fedit"),
        ("fed-sb", "ffa-lora"),
        ("fedit", "ffa-lora"),
    ]
    for each in found:
        seeds = [s for s in range(4) if {(each.first.method, s), (each.second.method, s)} <= SCORES.keys()]
        assert each.seeds == seeds
        first, second = (np.array([SCORES[g.method, s] for s in seeds]) for g in (each.first, each.second))
        # The smallest step between two scores is 0.005.
        error = np.sqrt((np.var(first - second, ddof=1) + 0.005**2 / 6) / len(seeds))
        mean, free = np.mean(first - second), len(seeds) - 1
        assert each.p == pytest.approx(2 * stats.t.sf(mean / error, free))
        assert (each.mean.low, each.mean.high) == pytest.approx(stats.t.interval(0.95, free, mean, error))
    # The intervals of the best two overlap widely, and their difference is settled all the same.
    assert [d.settled for d in found] == [True, False, False]
    assert "do not separate" not in caveat(comparison, found)
    assert "do not separate" in caveat(comparison, [])
    assert [d.second.method for d in to_best(found)] == ["fedit", "ffa-lora"]


def test_equal_differences_of_few_seeds_are_no_certainty(tmp_path: Path) -> None:
    # 1,000 test examples; each seed differs by the same 14.
    first, second = [0.846, 0.871, 0.859], [0.832, 0.857, 0.845]
    scores = {("fed-sb", seed): score for seed, score in enumerate(first)}
    scores |= {("fedit", seed): score for seed, score in enumerate(second)}
    scores |= {("ffa-lora", seed): score + 0.001 for seed, score in enumerate(second)}
    found = differences(make(tmp_path, scores))
    p = 2 * stats.t.sf(14 / np.sqrt(1 / 6 / 3), 2)
    assert [d.p for d in found if d.first.method == "fed-sb" and d.second.method == "fedit"] == [pytest.approx(p)]
    assert all(d.mean.low is not None and d.mean.low < d.mean.mean for d in found)


def test_levels_of_privacy_and_single_seeds_are_not_compared(tmp_path: Path) -> None:
    open_runs = {key: score for key, score in SCORES.items() if key[0] == "fed-sb"}
    make(tmp_path, open_runs)
    write(tmp_path / "single", 1, [0.5] * FINAL + [0.6], config={"method.name": "fedit", "method.rank": 4})
    private = {"privacy.mode": "example", "privacy.target_epsilon": 3.0, "method.name": "fedit", "method.rank": 4}
    for seed in range(3):
        write(tmp_path / f"private-{seed}", seed, [0.5] * FINAL + [0.6], config=private)
    assert not differences(compare(read_runs([tmp_path])))


def test_the_report_has_the_table(tmp_path: Path) -> None:
    comparison = make(tmp_path / "runs", SCORES)
    write_report([tmp_path / "runs"], tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "report" / "differences.csv")
    pd.testing.assert_frame_equal(table, differences_table(differences(comparison)), check_dtype=False)
    assert "Differences to the best" in (tmp_path / "out" / "report.html").read_text()


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_what_the_step_down_method_rejects(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(own <= new <= 1 for own, new in zip(p, adjusted, strict=True))
    for (a, new_a), (b, new_b) in itertools.combinations(zip(p, adjusted, strict=True), 2):
        assert (a <= b) <= (new_a <= new_b)
    for level in (0.01, 0.05, 0.2):
        rejected, ordered = set(), sorted(range(len(p)), key=lambda i: p[i])
        for place, index in enumerate(ordered):
            if p[index] * (len(p) - place) > level:
                break
            rejected.add(index)
        assert rejected == {i for i, new in enumerate(adjusted) if new <= level}
