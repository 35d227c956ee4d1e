"""Scores before and after training, against scipy and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from fedlora.errors import InputError
from fedlora.reporting.changes import changes, changes_shown, changes_table
from fedlora.reporting.comparison import compare
from fedlora.reporting.differences import differences
from fedlora.reporting.report import write_reports
from fedlora.reporting.runs import read_runs
from fedlora.reporting.tables import groups_table, runs_table
from tests.reporting.folders import make_run

BEFORE = {"perplexity": [8.0, 8.0, 8.0], "rougeL": [0.30, 0.30, 0.30], "exact_match": [0.0, 0.0, 0.0]}
AFTER = {"perplexity": [3.5, 3.0, 3.25], "rougeL": [0.55, 0.60, 0.50], "exact_match": [0.02, 0.0, 0.01]}


def make(
    folder: Path, before: dict[str, list[Any]], after: dict[str, list[Any]], task: str = "causal-lm", **config: Any
) -> None:
    """Runs of three seeds with these scores."""
    folder.mkdir(parents=True)
    for seed in range(3):
        path = make_run(folder / f"{seed}", seed, {"run.seed": seed, **config}, task=task)
        summary = json.loads((path / "summary.json").read_text())
        for name, scores in (("start", before), ("final", after)):
            summary[name] = {"loss": 1.0} | {metric: values[seed] for metric, values in scores.items()}
        (path / "summary.json").write_text(json.dumps(summary))


def test_changes_are_by_seed_with_students_interval(tmp_path: Path) -> None:
    make(tmp_path / "runs", BEFORE, AFTER)
    comparison = compare(read_runs([tmp_path / "runs"]))
    table = changes_table(changes(comparison)).set_index("metric")
    assert list(table.index) == ["perplexity", "exact_match", "rougeL"]  # the task's order; there are no others
    for metric, row in table.iterrows():
        test = stats.ttest_rel(AFTER[metric], BEFORE[metric])
        low, high = test.confidence_interval(0.95)
        assert (row["change_low"], row["change_high"]) == pytest.approx((low, high))
        for name, values in (("before", BEFORE[metric]), ("after", AFTER[metric])):
            assert row[name] == pytest.approx(sum(values) / 3)
        assert row["change"] == pytest.approx(row["after"] - row["before"])
        assert row["n"] == 3
    shown = changes_shown(changes(comparison)).set_index("metric")
    assert shown.loc["rougeL", "before"] == "30.0 ± 0.0 %"
    assert shown.loc["rougeL", "after"] == "55.0 ± 12.4 %"
    assert shown.loc["rougeL", "change"] == "25.0 ± 12.4 %"
    assert shown.loc["perplexity", "after"] == "3.25 ± 0.62"


def test_the_tables_of_runs_and_groups_have_the_start(tmp_path: Path) -> None:
    make(tmp_path / "runs", BEFORE, AFTER)
    comparison = compare(read_runs([tmp_path / "runs"]))
    assert list(runs_table(comparison)["start_rougeL"]) == BEFORE["rougeL"]
    assert groups_table(comparison).iloc[0]["start_perplexity"] == 8.0


def test_what_was_not_measured_or_cannot_change_is_left_out(tmp_path: Path) -> None:
    make(tmp_path / "text", BEFORE | {"bleu": [math.nan, 1.0, 2.0]}, AFTER | {"bleu": [3.0] * 3})
    assert "bleu" not in {each.metric for each in changes(compare(read_runs([tmp_path / "text"])))}
    shares = {"accuracy": [0.5] * 3, "macro_f1": [0.4] * 3, "majority": [0.6] * 3}
    make(tmp_path / "classes", shares, shares | {"accuracy": [0.7, 0.8, 0.75]}, task="sequence-classification")
    found = changes(compare(read_runs([tmp_path / "classes"])))
    assert [each.metric for each in found] == ["accuracy", "macro_f1"]
    make_run(tmp_path / "without", 0, {})
    without = compare(read_runs([tmp_path / "without"]))
    assert not changes(without)
    assert not [name for name in runs_table(without) if name.startswith("start_")]


def test_a_start_that_is_no_score_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "runs", BEFORE | {"rougeL": [30.0, 0.3, 0.3]}, AFTER)
    with pytest.raises(InputError, match=r"start\.rougeL"):
        read_runs([tmp_path])


@pytest.mark.usefixtures("quick")
def test_the_report_has_the_table_of_every_data_set_and_compares_none(tmp_path: Path) -> None:
    make(tmp_path / "runs" / "a", BEFORE, AFTER, **{"data.name": "asset:e2e-nlg"})
    make(tmp_path / "runs" / "b", BEFORE, AFTER, **{"data.name": "/some/where/problems"})
    (page, first), (_, second) = write_reports([tmp_path / "runs"], tmp_path / "out")
    assert not differences(first)
    folders = ("asset-e2e-nlg-causal-lm", "problems-causal-lm")
    for name, comparison in zip(folders, (first, second), strict=True):
        assert [group.label for group in comparison.groups] == ["fed-sb"]
        table = pd.read_csv(tmp_path / "out" / "report" / name / "changes.csv")
        pd.testing.assert_frame_equal(table, changes_table(changes(comparison)), check_dtype=False)
    lines = (tmp_path / "out" / "report" / folders[0] / "changes.md").read_text().splitlines()
    assert lines[-1] == "| fed-sb | no privacy | rougeL | 3 | 30.0 ± 0.0 % | 55.0 ± 12.4 % | 25.0 ± 12.4 % |"
    text = page.read_text()
    assert "Before and after training" in text
    assert 'data-q="change.rougeL.mean"' in text
    for name in ("runs", "groups"):
        assert "/some/where" not in (tmp_path / "out" / "report" / folders[1] / f"{name}.csv").read_text()


def test_groups_on_the_same_data_are_compared(tmp_path: Path) -> None:
    for rank in (2, 4):
        make(tmp_path / f"{rank}", BEFORE, AFTER, **{"method.rank": rank, "data.name": "asset:e2e-nlg"})
    make(tmp_path / "other", BEFORE, AFTER, **{"method.rank": 2, "data.name": "asset:social-iqa"})
    found = differences(compare(read_runs([tmp_path])))
    assert [(each.first.tested_on, each.second.tested_on) for each in found] == [
        (("asset:e2e-nlg", None, None), ("asset:e2e-nlg", None, None))
    ]
