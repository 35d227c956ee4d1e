"""Scores of clients' own models: a report of their own, and never one ranking with those of global models."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from fedlora.errors import InputError
from fedlora.reporting.comparison import compare
from fedlora.reporting.report import write_reports
from fedlora.reporting.runs import read_runs
from tests.reporting.folders import make_run


def own_models(path: Path, number: int, **changes: object) -> Path:
    run = make_run(path, number, {"method.name": "fedit"})
    summary = json.loads((run / "summary.json").read_text()) | {"personalised": True} | changes
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def names(table: Path) -> set[str]:
    return {row["run"] for row in csv.DictReader(table.open())}


def test_they_are_on_a_page_and_in_tables_of_their_own(tmp_path: Path) -> None:
    for number in range(2):
        make_run(tmp_path / f"global-{number}", number, {"run.seed": number})
    own_models(tmp_path / "own", 5)
    (page, common), (other, own) = write_reports([tmp_path])
    assert (page.name, other.name) == ("report.html", "personalised.html")
    assert names(tmp_path / "report" / "runs.csv") == {"global-0", "global-1"}
    assert names(tmp_path / "report" / "personalised" / "runs.csv") == {"own"}
    assert [comparison.personalised for comparison in (common, own)] == [False, True]
    assert {group.method for group in common.front} == {"fed-sb"}
    assert "Scores are personalised" in other.read_text()
    assert "own test accuracy" in other.read_text()
    assert " · 3 rounds · 1,281 test examples" in page.read_text()
    assert "personalised" not in page.read_text().partition("<nav")[0]


def test_alone_they_have_the_page(tmp_path: Path) -> None:
    own_models(tmp_path / "own", 5)
    [(page, comparison)] = write_reports([tmp_path])
    assert page.name == "report.html"
    assert comparison.personalised
    assert names(tmp_path / "report" / "runs.csv") == {"own"}


def test_one_ranking_of_both_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "global", 0, {})
    own_models(tmp_path / "own", 5)
    with pytest.raises(InputError, match="own models and of global models cannot be compared; report on each alone"):
        compare(read_runs([tmp_path]))


def test_models_that_nobody_scored_are_no_part_of_a_report(tmp_path: Path) -> None:
    own_models(tmp_path / "own", 5, final={})
    with pytest.raises(InputError, match=r"nobody scored; run it again with server\.fraction_evaluate"):
        read_runs([tmp_path])


def test_what_a_study_tuned_and_pages_that_are_no_longer_written(tmp_path: Path) -> None:
    """Tuning reads validation examples on the server, hence of global models: it stands on their page alone."""
    make_run(tmp_path / "runs" / "global", 0, {})
    own = own_models(tmp_path / "runs" / "own", 5)
    (tmp_path / "study.toml").write_text("")
    cost = {"runs": 2, "seconds": 1.0, "bytes": 5}
    group = {"values": {}, "cost": cost, "candidates": [{"value": 0.1}]}
    tuning = {"over": "client.learning_rate", "seeds": [0], "cost": cost, "groups": [group]}
    failed = {"name": "broken", "status": "failed", "error": "it broke"}
    state = {"name": "s", "points": [failed], "tuning": tuning, "report": {"budgets": {"rounds": [2.0]}}}
    (tmp_path / "study.json").write_text(json.dumps(state))
    pages = [page.read_text() for page, _ in write_reports([tmp_path])]
    for said, expected in (("What s tuned before", [True, False]), ("it broke", [True, False])):
        assert [said in page for page in pages] == expected
    assert all("budget.rounds.2.mean" in page for page in pages)
    shutil.rmtree(own)
    write_reports([tmp_path])
    assert not list(tmp_path.rglob("*personalised*"))
