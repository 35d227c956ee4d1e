"""The committed results: small, all of them shown or named on a page, and the pages' tables equal to them."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path

import pytest

from fedlora.experiments.benchmarks import audit
from fedlora.reporting.comparison import Mean

ROOT = Path(__file__).parents[1]
LIMIT = 2_500_000
"""Bytes of all committed results and pictures together."""
BENCHMARKS = ROOT / "experiments" / "benchmarks"
STUDIES = ROOT / "experiments" / "studies"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("experiments/*/*.md"))]


def results() -> list[Path]:
    """Every committed picture, and every committed file below a folder named results."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "experiments", "docs"]
    listed = subprocess.run(git, check=True, capture_output=True, text=True).stdout.split("\0")
    paths = [ROOT / name for name in listed if "/results/" in name or name.endswith((".png", ".svg", ".gif", ".jpg"))]
    return [path for path in paths if path.exists()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a git checkout knows what is committed")
def test_committed_results_stay_small_and_are_all_named_on_a_page() -> None:
    found = results()
    assert len(found) > 20
    assert sum(path.stat().st_size for path in found) <= LIMIT
    text = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for path in found:
        # Of a study's groups and changes both forms are kept: the one to read is named.
        name = path.with_suffix(".md").name if path.name in ("groups.csv", "changes.csv") else path.name
        here = [page for page in PAGES if page.parent in path.parents or page.parent == ROOT]
        assert any(name in text[page] for page in here), f"no page names {path.relative_to(ROOT)}: remove it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_results_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)) | set(re.findall(r"`(results/[\w/.-]+)`", text))
    if page.parent == BENCHMARKS:
        named |= {f"results/{name}" for name in re.findall(r"`(\w+\.jsonl?)`", text)}
    missing = [name for name in named if not (page.parent / name).exists()]
    assert not missing


def rows(page: Path, heading: str = "") -> list[list[str]]:
    """Rows of the first table below a heading, or of the page, without its head."""
    section = page.read_text(encoding="utf-8")
    if heading:
        section = section.split(f"\n## {heading}")[1].split("\n## ")[0]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table, heading
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[0].splitlines()[2:]]


@pytest.mark.parametrize(
    ("heading", "study", "column", "values"),
    [
        ("Privacy: which", "privacy", "privacy", ["ε 1", "ε 3", "ε 8", "no privacy"]),
        ("Privacy with", "privacy_20newsgroups", "privacy", ["ε 1", "ε 3", "ε 8", "no privacy"]),
        ("Communication", "communication", "data.partition.clients", ["5", "20", "80"]),
    ],
)
def test_the_studies_tables_are_what_their_groups_say(heading: str, study: str, column: str, values: list[str]) -> None:
    with (STUDIES / "results" / study / "groups.csv").open(encoding="utf-8", newline="") as file:
        groups = {(row["method"], row["method.rank"], row[column]): row for row in csv.DictReader(file)}
    table = rows(STUDIES / "README.md", heading)
    assert len(table) * len(values) == len(groups)
    for name, *scores, megabytes in table:
        method, rank = name.split(", rank ")
        found = [groups[method, rank, value] for value in values]
        for score, group in zip(scores, found, strict=True):
            mean, low = (100 * float(group[key]) for key in ("accuracy", "accuracy_low"))
            assert score == f"{mean:.1f} ± {mean - low:.1f}", name
        # One size stands for the row: without privacy messages are some bytes shorter, and the page names 20 clients.
        sizes = {f"{float(group['total_bytes']) / 1e6:.1f}" for group in found}
        assert megabytes in sizes, name


def test_the_wires_table_is_what_its_differences_and_groups_say() -> None:
    folder = STUDIES / "results" / "wire"
    with (folder / "groups.csv").open(encoding="utf-8", newline="") as file:
        groups = {(row["method"], row["wire.codec"] or row["wire.uplink_codec"]): row for row in csv.DictReader(file)}
    with (folder / "runs.csv").open(encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    assert all(run["payload_bytes"] == run["formula_bytes"] for run in runs)
    for name, plain, *differences, _, _ in rows(STUDIES / "README.md", "The wire"):
        method = name.split(", ")[0]
        assert plain == f"{100 * float(groups[method, '']['accuracy']):.1f}"
        for codec, shown in zip(("int8", "onebit"), differences, strict=True):
            by_seed = {
                (run["wire.codec"] or run["wire.uplink_codec"], run["seed"]): 100 * float(run["accuracy"])
                for run in runs
                if run["method"] == method
            }
            found = Mean.of([by_seed[codec, str(seed)] - by_seed["", str(seed)] for seed in range(8)])
            assert found.half is not None
            assert shown.replace("-0.00", "0.00") == f"{found.mean:.2f} ± {found.half:.2f}".replace("-0.00", "0.00")


@pytest.mark.parametrize("study", ["comparison", "comparison_20newsgroups", "comparison_mpnet"])
def test_the_comparisons_tables_are_what_their_groups_say(study: str) -> None:
    with (STUDIES / "results" / study / "groups.csv").open(encoding="utf-8", newline="") as file:
        groups = {(row["method"], row["privacy"]): row for row in csv.DictReader(file)}
    table = rows(STUDIES / f"{study}.md")
    assert len(table) == 8
    for name, private, free, megabytes, up, seconds in table:
        method = name.split(", ")[0]
        for shown, level in ((private, "ε 3"), (free, "no privacy")):
            mean, low = (100 * float(groups[method, level][key]) for key in ("accuracy", "accuracy_low"))
            assert shown == f"{mean:.1f} ± {mean - low:.1f}", name
        group = groups[method, "ε 3"]
        assert megabytes == f"{float(group['total_bytes']) / 1e6:.1f}"
        assert up == f"{float(group['uplink_bytes']) / 1e6:.1f}"
        assert seconds == f"{float(group['wall_seconds']):.0f}"


def test_the_results_in_readme_are_the_comparisons() -> None:
    columns = [row[:4] for row in rows(STUDIES / "comparison.md")]
    assert rows(ROOT / "README.md", "Results") == columns


def not_as_written(folder: Path) -> list[Path]:
    """Return the tables of changes below ``results`` that no page of the folder has as the report wrote them."""
    text = [page.read_text(encoding="utf-8") for page in folder.glob("*.md")]
    tables = sorted(folder.glob("results/*/changes.md"))
    return [path for path in tables if not any(path.read_text(encoding="utf-8") in page for page in text)]


def test_tables_of_changes_are_on_a_page_as_the_report_wrote_them(tmp_path: Path) -> None:
    assert not not_as_written(STUDIES)
    table = tmp_path / "results" / "chat" / "changes.md"
    table.parent.mkdir(parents=True)
    table.write_text("| metric | after |\n| --- | --- |\n| rougeL | 55.0 ± 12.4 % |\n")
    page = tmp_path / "chat.md"
    page.write_text(f"# Chat\n\n{table.read_text()}\nAnd so on.\n")
    assert not not_as_written(tmp_path)
    page.write_text(page.read_text().replace("55.0", "55.1"))
    assert not_as_written(tmp_path) == [table]


def test_the_cohorts_table_is_what_the_raw_figures_say() -> None:
    sizes = {"MiniLM": "minilm", "BERT-large": "bert-large", "Llama-1B": "llama-1b"}
    table = rows(BENCHMARKS / "README.md", "Cohorts under DP-SGD")
    files = {row[-1].strip("`") for row in table}
    raws = {file: json.loads((BENCHMARKS / file).read_text(encoding="utf-8")) for file in files}
    measured = sum(len(size["cohort"]) for raw in raws.values() for size in raw["sizes"].values())
    assert len({(name, fused, file) for name, _, _, fused, *_, file in table}) == len(table) == measured
    for name, batch, cohort, fused, ours, peer, ratio, file in table:
        raw = raws[file.strip("`")]
        shape = raw["settings"]["sizes"][sizes[name]]
        assert (batch, cohort) == (f"{shape['batch']} x {shape['tokens']}", str(shape["cohort"]))
        figures = raw["sizes"][sizes[name]]
        own = figures["cohort"]["islands" if fused == "yes" else "none"]
        assert float(ours) == pytest.approx(own["client_steps_a_second"], rel=0.001)
        assert float(peer) == pytest.approx(figures["peer"]["client_steps_a_second"], abs=0.051)
        assert float(ratio) == pytest.approx(own["ratio"], abs=0.051)


def test_the_federations_table_is_what_the_raw_figures_say() -> None:
    parts = ("train", "communicate", "aggregate", "evaluate")
    (row,) = rows(BENCHMARKS / "README.md", "A whole federation")
    rounds = json.loads((BENCHMARKS / "results" / row[0].strip("`")).read_text(encoding="utf-8"))["ours"]["rounds"][1:]
    seconds = [sum(each[part] for each in rounds) for part in parts]
    total = sum(each["wall"] for each in rounds)
    assert row[1:7] == [f"{value:.2f}" for value in (*seconds, total - sum(seconds), total)]
    assert row[7] == f"{(seconds[0] + seconds[3]) / total:.1%}".replace("%", " %")


def test_the_table_of_audits_is_that_of_the_raw_figures() -> None:
    cases = json.loads((BENCHMARKS / "results" / "audit_white_box.json").read_text(encoding="utf-8"))["cases"]
    shown = [line.strip("| ").split(" | ") for line in audit.table({"cases": cases}).splitlines()]
    assert rows(BENCHMARKS / "README.md", "What audits prove") == shown[2:]
    bounds = [(found["lower_bound"], found["claimed"]) for case in cases.values() for found in case.values()]
    assert len(bounds) == 6
    for bound, claimed in bounds:
        assert bound["confidence"] == 0.95
        assert 0.74 * claimed["epsilon"] <= bound["epsilon"] < claimed["epsilon"]
