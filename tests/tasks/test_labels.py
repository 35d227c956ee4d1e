"""Cells of a label column become words, lists or numbers, or an error names the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import load_config
from fedlora.data.sources import Examples, load_examples, materialise
from fedlora.errors import InputError, LabelError
from fedlora.tasks import get_task
from fedlora.tasks.labels import Column


def column(cells: list[Any], typed: bool = True, classes: list[str] | None = None) -> Column:
    return Column("data.label", "y", cells, lambda row: f"row {row + 1}", "a file", typed, classes)


def load(task: str, source: Any, **data: Any) -> Examples:
    given = {"name": str(source), "label": "y", "test": str(source), "partition": {"clients": 1}, **data}
    model = {"name": "m", "task": task}
    return load_examples(load_config({"model": model, "data": given, "method": {"name": "fedit"}}))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(st.lists(st.floats(-1e30, 1e30), min_size=1), st.booleans())
def test_numbers_are_read_as_they_are(values: list[float], typed: bool) -> None:
    cells = values if typed else [repr(value) for value in values]
    assert get_task("regression").read_labels(column(cells, typed), {}) == values


@pytest.mark.parametrize(
    ("cell", "typed", "message"),
    [
        ("abc", True, "row 2 of a file holds the str 'abc', which is no number"),
        ("1.5", True, "holds the str '1.5'"),
        ("1,5", False, "holds the str '1,5'"),
        (True, True, "holds the bool True"),
        (float("inf"), True, "holds the float inf"),
        (1e39, True, r"holds the float 1e\+39"),
        (10**400, True, "holds the int 1000"),
        ([1.0], True, "holds the list"),
        (None, True, "has no label"),
        (float("nan"), True, "has no label"),
        (" ", False, "has no label"),
    ],
)
def test_what_is_no_number_is_named(cell: Any, typed: bool, message: str) -> None:
    cells = [1.0, cell] if typed else ["1.0", cell]
    with pytest.raises(InputError, match=message):
        get_task("regression").read_labels(column(cells, typed), {})


def test_numbers_of_classes_are_no_numbers() -> None:
    with pytest.raises(InputError, match="holds classes"):
        get_task("regression").read_labels(column([0, 1], classes=["a", "b"]), {})


def test_several_classes_are_a_list_or_divided_text() -> None:
    read = get_task("multi-label-classification").read_labels
    expected = [["a", "b c"], [], ["b c"]]
    assert read(column([["a", "b c", "a"], [], ["b c"]]), {}) == expected
    for divider in "|;,":
        assert read(column([f"a{divider} b c ", None, f"b c{divider}"], typed=False), {}) == expected
    assert read(column([[0, 1], [], [1]], classes=["a", "b c"]), {}) == expected


@pytest.mark.parametrize("cell", [None, 3, [None], [["a"]], [1.5], [""], {"a": 1}, b"a"])
def test_what_is_no_list_of_classes_is_named(cell: Any) -> None:
    with pytest.raises(InputError, match="row 2 of a file"):
        get_task("multi-label-classification").read_labels(column([["a"], cell]), {})


def test_multi_label_examples_are_zeros_and_ones(tmp_path: Path) -> None:
    rows = [{"text": "x", "y": ["b", "a"]}, {"text": "y", "y": []}, {"text": "z", "y": ["10"]}]
    found = load("multi-label-classification", write(tmp_path / "a.jsonl", rows))
    assert found.label_names == ["10", "a", "b"]
    assert found.train is not None
    labels = get_task("multi-label-classification").label_array(found.train["label"][:])
    assert labels.dtype == np.float32
    assert labels.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    with pytest.raises(LabelError, match="'10' is not in"):
        load("multi-label-classification", tmp_path / "a.jsonl", label_names=["a", "b"])
    with pytest.raises(InputError, match="names no class at all"):
        load("multi-label-classification", write(tmp_path / "b.jsonl", [{"text": "x", "y": []}]))


def test_words_and_tags_are_lists_or_divided_text(tmp_path: Path) -> None:
    rows = [{"w": ["New", "York", "wins"], "y": ["B-LOC", "I-LOC", "O"]}, {"w": ["yes"], "y": ["O"]}]
    lists = load("token-classification", write(tmp_path / "a.jsonl", rows), text="w")
    (tmp_path / "a.csv").write_text("w,y\nNew York wins,B-LOC I-LOC O\nyes,O\n")
    features = datasets.Features(
        {
            "w": datasets.List(datasets.Value("string")),
            "y": datasets.List(datasets.ClassLabel(names=["O", "B-LOC", "I-LOC"])),
        }
    )
    hub = datasets.Dataset.from_dict({"w": [r["w"] for r in rows], "y": [[1, 2, 0], [0]]}, features=features)
    hub_folder = materialise({"train": hub, "test": hub})
    text = load("token-classification", tmp_path / "a.csv", text="w")
    classes = load("token-classification", hub_folder, text="w", test="test")
    for found, names in (
        (lists, ["B-LOC", "I-LOC", "O"]),
        (text, ["B-LOC", "I-LOC", "O"]),
        (classes, ["O", "B-LOC", "I-LOC"]),
    ):
        assert found.label_names == names
        assert found.train is not None
        assert found.train["text"][:] == [row["w"] for row in rows]
        assert [[names[tag] for tag in tags] for tags in found.train["label"]] == [row["y"] for row in rows]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"w": ["a", "b"], "y": ["O"]}, "line 2 of a.jsonl has 1 tags for 2 words"),
        ({"w": ["a"], "y": None}, "line 2 of a.jsonl has no tags"),
        ({"w": ["a"], "y": 3}, "line 2 of a.jsonl holds the int 3"),
        ({"w": ["a"], "y": [None]}, "line 2 of a.jsonl holds the NoneType None in its list of tags"),
        ({"w": ["a", 3], "y": ["O", "O"]}, "line 2 of a.jsonl holds the int 3, not words"),
        ({"w": 3, "y": ["O"]}, "line 2 of a.jsonl holds the int 3, not words"),
        ({"w": ["\ud800"], "y": ["O"]}, "line 2 holds half of a surrogate pair"),
    ],
)
def test_words_and_tags_that_do_not_fit_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"w": ["x", "y"], "y": ["O", "B-X"]}, row])
    with pytest.raises(InputError, match=message):
        load("token-classification", path, text="w")


def test_a_pair_needs_both_texts(tmp_path: Path) -> None:
    rows = [{"text": "a", "b": "c", "y": "1"}, {"text": "a", "b": "", "y": "2"}, {"text": "d", "b": "e", "y": "2"}]
    path = write(tmp_path / "a.jsonl", rows)
    found = load("sequence-classification", path, text_pair="b")
    assert found.train is not None
    assert found.train["text_pair"][:] == ["c", "e"]
    assert "1 of 3 rows have no text and are left out" in found.notes[0]
    with pytest.raises(InputError, match=r"data\.text_pair = 'nowhere': there is no such column"):
        load("sequence-classification", path, text_pair="nowhere")


def test_a_nodes_own_words_are_read_whatever_they_are(tmp_path: Path) -> None:
    rows = [{"w": ["a", 3], "y": ["O"]}, {"w": None, "y": ["B-X", "O"]}, {"w": "b c", "y": "O B-X"}]
    own = load(
        "token-classification", write(tmp_path / "a.jsonl", rows), text="w", test="server", label_names=["O", "B-X"]
    )
    assert own.train is not None
    assert own.train["text"][:] == [["a", "3"], [], ["b", "c"]]
    assert own.train["label"][:] == [[0], [1, 0], [0, 1]]
    with pytest.raises(LabelError, match="'B-X' is not in"):
        load("token-classification", tmp_path / "a.jsonl", text="w", test="server", label_names=["O", "B-Y"])
