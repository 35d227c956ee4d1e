"""A report of several tasks and data sets: a section each, and no comparison over them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from fedlora.reporting.report import write_reports
from tests.command import fedlora
from tests.reporting.folders import make_run
from tests.reporting.packed import unpacked

CLASSES, TEXT = "asset-rotten-tomatoes-sequence-classification", "asset-rotten-tomatoes-causal-lm"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two tasks, one of them on two data sets."""
    folder = tmp_path_factory.mktemp("several")
    for number, method in enumerate(("fed-sb", "fedit")):
        make_run(folder / f"c{number}", number, {"method.name": method})
        make_run(folder / f"t{number}", 10 + number, {"method.name": method}, task="causal-lm")
    make_run(folder / "n", 20, {"data.name": "asset:20newsgroups"})
    return folder


def runs_in(table: Path) -> set[str]:
    return {row["run"] for row in csv.DictReader(table.open())}


def test_each_task_and_data_set_has_a_section_with_tables_and_figures_of_its_own(several: Path, tmp_path: Path) -> None:
    reports = write_reports([several], tmp_path)
    assert [page.name for page, _ in reports] == ["report.html"] * 3
    assert [sorted(run.name for run in comparison.runs) for _, comparison in reports] == [
        ["c0", "c1"],
        ["n"],
        ["t0", "t1"],
    ]
    assert [comparison.score for _, comparison in reports] == ["accuracy", "accuracy", "perplexity"]
    folders = {path.name for path in (tmp_path / "report").iterdir() if path.is_dir()}
    assert folders == {CLASSES, "asset-20newsgroups-sequence-classification", TEXT}
    assert runs_in(tmp_path / "report" / CLASSES / "runs.csv") == {"c0", "c1"}
    assert runs_in(tmp_path / "report" / TEXT / "runs.csv") == {"t0", "t1"}
    assert (tmp_path / "report" / TEXT / "figures" / "score-bytes.png").is_file()
    page = (tmp_path / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page.partition("<script")[0])
    assert len(ids) == len(set(ids))
    assert {f"{CLASSES}-results", f"{TEXT}-results", f"plot-{TEXT}-score-bytes-0"} <= set(ids)
    # Every plot that has a place has its data.
    places = set(re.findall(r'data-plot="([^"]+)"', page))
    assert places == {name.removeprefix("plot-") for name in ids if name.startswith("plot-")}
    assert places == json.loads(unpacked(page, "plots")).keys()


def test_no_sentence_or_table_compares_scores_of_two_sections(several: Path, tmp_path: Path) -> None:
    write_reports([several], tmp_path)
    page = (tmp_path / "report.html").read_text()
    answers = re.findall(r'<p class="answer" id="[^"]+">(.*?)</p>', page, re.DOTALL)
    assert [re.match(r"Highest accuracy|Lowest perplexity", answer) is not None for answer in answers] == [True] * 3
    parts = page.split('<section class="part"')[1:]
    assert len(parts) == 3
    scores = [set(re.findall(r'data-q="(accuracy|perplexity)\b', part)) for part in parts]
    assert scores == [{"accuracy"}, {"accuracy"}, {"perplexity"}]


def test_a_later_report_of_one_task_takes_the_place_of_that_of_several(several: Path, tmp_path: Path) -> None:
    write_reports([several], tmp_path)
    write_reports([several / "t0", several / "t1"], tmp_path)
    assert not (tmp_path / "report" / TEXT).exists()
    assert runs_in(tmp_path / "report" / "runs.csv") == {"t0", "t1"}
    page = (tmp_path / "report.html").read_text()
    assert '<section class="part"' not in page
    assert 'id="results"' in page


def test_the_command_tells_of_each_section_and_of_the_page_once(several: Path, tmp_path: Path) -> None:
    done = fedlora("report", several, "--output", tmp_path)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        "2 runs of sequence-classification, asset:rotten-tomatoes, 2 configurations",
        "1 run of sequence-classification, asset:20newsgroups, 1 configuration",
        "2 runs of causal-lm, asset:rotten-tomatoes, 2 configurations",
        str(tmp_path / "report.html"),
    ]
