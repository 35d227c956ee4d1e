"""What a study tuned, and which of its runs failed, is in its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import fedlora
from tests.reporting.folders import make_run

STATE = {
    "name": "small",
    "points": [
        {"name": "a", "run": "runs/a", "values": {}, "status": "done", "error": None},
        {"name": "b", "run": "runs/b", "values": {}, "status": "failed", "error": "out of <memory>"},
    ],
    "tuning": {
        "over": "client.learning_rate",
        "seeds": [7],
        "cost": {"runs": 2, "seconds": 12.5, "bytes": 3_400_000},
        "groups": [
            {
                "values": {"method.name": "fed-sb", "privacy.target_epsilon": 8.0},
                "chosen": 0.06,
                "at_edge": True,
                "covered_by_privacy": False,
                "cost": {"runs": 2, "seconds": 12.5, "bytes": 3_400_000},
                "candidates": [{"value": 0.02}, {"value": 0.06}],
            }
        ],
    },
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "a", 0, {})
    make_run(tmp_path / "tuning" / "t", 1, {"run.seed": 7})
    (tmp_path / "study.toml").write_text("")
    (tmp_path / "study.json").write_text(json.dumps(STATE))
    return tmp_path


@pytest.mark.usefixtures("quick")
def test_the_report_says_what_was_tuned_at_what_cost_and_what_failed(study: Path) -> None:
    assert fedlora("report", study).code == 0
    page = (study / "report.html").read_text()
    assert "out of &lt;memory&gt;" in page
    for part in ("fed-sb · ε 8", "0.02, 0.06", "at the edge", "no epsilon covers the choice"):
        assert part in page
    for value, name, text in (("2.0", "runs", "2"), ("12.5", "seconds", "12.5 s"), ("3400000.0", "bytes", "3.4 MB")):
        form = "integer" if name == "runs" else name
        mark = f'<data value="{value}" data-of="small" data-q="tuning.{name}" data-form="{form}">{text}</data>'
        assert mark in page
    # Tuning runs are no part of the comparison.
    assert (study / "report" / "runs.csv").read_text().count("\n") == 2


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"name": 1, "points": []}'])
def test_a_damaged_plan_is_refused_by_name(study: Path, content: str) -> None:
    (study / "study.json").write_text(content)
    done = fedlora("report", study)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "study.json" in done.err
    assert not (study / "report.html").exists()


@pytest.mark.usefixtures("quick")
def test_a_language_models_report_is_about_perplexity(tmp_path: Path) -> None:
    for number, rank in enumerate((4, 8)):
        make_run(tmp_path / f"r{rank}", number, {"method.rank": rank}, task="causal-lm")
    assert fedlora("report", tmp_path).code == 0
    page = (tmp_path / "report.html").read_text()
    best = min(
        (json.loads((tmp_path / f"r{r}" / "summary.json").read_text())["final"]["perplexity"], r) for r in (4, 8)
    )
    answer = page.partition('id="answer">')[2].partition("</p>")[0]
    assert answer.startswith("Lowest perplexity")
    assert f"rank {best[1]}</strong>" in answer
    assert f'value="{best[0]!r}"' in answer
