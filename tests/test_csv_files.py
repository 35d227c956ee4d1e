"""Cells of text are no formulas in any CSV that is written, and come back as they were."""

from __future__ import annotations

import ast
import csv
import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import load_config
from fedlora.csv_files import csv_lines, plain_cell, read_csv, table_csv, text_cell
from fedlora.reporting.runs import PartitionLine, _csv_reader
from fedlora.reporting.tables import table_files
from fedlora.results.folder import PARTITION, RunFolder
from tests.configs import BASE

ROOT = Path(__file__).parents[1]
SIGNS = "=+-@\t\r\n＝＋－＠"
FORMULAS = [
    "=cmd|' /C calc'!A0", "=1+1", "+1+cmd", "-1+cmd", "@SUM(1)", "\t=1", "\r=1", "\n=1", " =1", "\ufeff=1", "\xa0=1",
    "＝1", "=HYPERLINK(\"http://x\",\"y\")", "'=1", "''=1", "--1", "+", "-", "=", "+49 30 123", "-1 2", "-inf", "-١",
]  # fmt: skip
TEXTS = ["", "good", "'tis", "a=b", "1", "-1", "-1.5", "+2", "1e-5", "-1e+5", ".5", "ä", 'a "quote"', "a,b", "a\nb"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_told_to_be_text(text: str) -> None:
    assert text_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", TEXTS)
def test_other_texts_stay(text: str) -> None:
    assert text_cell(text) == text


@pytest.mark.parametrize("number", [-1, -1.5, 0, 1e-5, float("-inf"), True, None])
def test_numbers_stay_numbers(number: Any) -> None:
    assert text_cell(number) is number
    (line,) = csv_lines(["x", "y"], [{"x": number, "y": 1}])
    assert line.partition(",")[0] == ("" if number is None else str(number))


texts = st.text() | st.sampled_from([*FORMULAS, *TEXTS]) | st.text("'=+-@\t 1", max_size=4)


@given(texts)
def test_a_cell_comes_back_as_it_was_and_never_begins_as_a_formula(text: str) -> None:
    cell = str(text_cell(text))
    assert plain_cell(cell) == text
    begins = cell.lstrip()[:1]
    try:
        float(cell)
    except ValueError:
        assert begins == "" or begins not in SIGNS
        assert cell[:1] not in ("\t", "\r", "\n")


@given(st.lists(st.fixed_dictionaries({"name": texts, "label": texts, "examples": st.integers(-9, 9)}), max_size=4))
def test_rows_come_back_as_they_were(rows: list[dict[str, Any]]) -> None:
    text = "\n".join(["name,label,examples", *csv_lines(["name", "label", "examples"], rows)]) + "\n"
    assert read_csv(text) == [{name: str(value) for name, value in row.items()} for row in rows]


def test_a_runs_partition_has_no_formulas_and_a_report_reads_what_was_meant(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", load_config(BASE))
    folder.write_partition(FORMULAS, FORMULAS[:3], [[1, 2, 3]] * len(FORMULAS))
    folder.close()
    text = (tmp_path / "run" / "partition.csv").read_bytes().decode()
    cells = [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
    assert not [cell for cell in cells if cell.lstrip("\ufeff \xa0")[:1] in tuple(SIGNS)]
    lines = _csv_reader(PartitionLine)(text)
    assert [line.name for line in lines] == [name for name in FORMULAS for _ in range(3)]
    assert {line.label for line in lines} == set(FORMULAS[:3])
    assert text.splitlines()[0] == ",".join(PARTITION)


def test_a_reports_tables_have_no_formulas(tmp_path: Path) -> None:
    table = pd.DataFrame({"run": ["=1+1", "b"], "=cmd": [-1.5, None], "x": ["-1", None], "n": [-3, 2]})
    text = table_files("runs", table)["runs.csv"].decode()
    assert text == "run,'=cmd,x,n\n'=1+1,-1.5,-1,-3\nb,,,2\n"
    # And are, but for that, what they were.
    plain = pd.DataFrame({"run": ["a"], "value": [0.1], "n": [3], "none": [None], "yes": [True]})
    assert table_csv(plain) == plain.to_csv(index=False, lineterminator="\n")
    empty = pd.DataFrame({"a": []})
    assert table_csv(empty) == "a\n"


def test_nothing_else_writes_csv() -> None:
    found = []
    for package in ("fedlora", "strategies", "clients", "experiments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
                if name in ("to_csv", "DictWriter") or (name == "writer" and "csv" in ast.dump(node)):
                    found.append(str(path.relative_to(ROOT)))
    assert sorted(set(found)) == ["fedlora/csv_files.py"]
