"""The page of all results that the documentation has: every committed study, with its question, command and table."""

from __future__ import annotations

import csv
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.pages import ROOT

RESULTS = ROOT / "experiments" / "studies" / "results"
FOLDERS = sorted(path for path in RESULTS.iterdir() if path.is_dir())


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("results_page")


def test_each_result_is_shown_with_its_question_command_figures_and_raw_files(module: ModuleType) -> None:
    page = module.results_page()
    assert len(FOLDERS) > 5
    for folder in FOLDERS:
        (part,) = [part for part in page.split("\n## ") if f"{{ #{folder.name} }}" in part.partition("\n")[0]]
        assert re.search(r"^ {4}(fedlora study experiments/studies/|python -m fedlora\.)", part, re.MULTILINE)
        for path in folder.iterdir():
            assert path.name in part or path.suffix == ".md"
        assert f"(#{folder.name})" in page


@pytest.mark.parametrize(
    "folder", [path for path in FOLDERS if (path / "groups.csv").exists()], ids=lambda path: path.name
)
def test_the_intervals_are_those_of_the_groups(module: ModuleType, folder: Path) -> None:
    page = module.results_page()
    (part,) = [part for part in page.split("\n## ") if f"{{ #{folder.name} }}" in part.partition("\n")[0]]
    with (folder / "groups.csv").open(encoding="utf-8", newline="") as file:
        groups = list(csv.DictReader(file))
    shown = [line.split(" | ") for line in part.splitlines() if "±" in line]
    assert len(shown) == len(groups)
    for cells, group in zip(shown, groups, strict=True):
        mean, low, high = (100 * float(group[f"accuracy{end}"]) for end in ("", "_low", "_high"))
        assert cells[0] == f"| {group['group']}"
        assert cells[2] == f"{mean:.1f} ± {(high - low) / 2:.1f}"
        assert cells[3] == f"{float(group['total_bytes']) / 1e6:.1f}"


def test_a_section_is_found_by_the_heading_that_mkdocs_gives_it(module: ModuleType) -> None:
    section = module.section_of("wire")
    assert section.question == "The wire: what do short encodings cost?"
    assert section.link == "studies/README.md#the-wire-what-do-short-encodings-cost"
    assert section.command == "    fedlora study experiments/studies/wire.toml\n    fedlora report runs/wire"
    assert module.section_of("comparison").link == "studies/comparison.md"


def test_results_of_which_no_section_tells_are_refused(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="no section of studies"):
        module.section_of("nothing")
