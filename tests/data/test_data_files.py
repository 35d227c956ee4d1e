"""Files as people have them: every row is what its lines say, or the error names the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.config import load_config
from fedlora.data.sources import Examples, load_examples, materialise
from fedlora.errors import InputError

ROWS = [(f"word {row}", "pos" if row % 2 else "neg") for row in range(10)]
CSV = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
OBJECTS = [{"text": text, "label": label} for text, label in ROWS]


def lines(objects: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in objects)


JSONL = lines(OBJECTS)
UNLIKE_IDS = lines([{**row, "id": [i, str(i), None, {}][i % 4]} for i, row in enumerate(OBJECTS)])
STRAY = "".join(f"{i},{'Q' * (i == 3)}{t}{'Q' * (i == 6)},{c}\n" for i, (t, c) in enumerate(ROWS))


def load(path: Path | str, **data: Any) -> Examples:
    """All rows: the file is its own test set."""
    content = {"name": str(path), "test": str(path), "partition": {"clients": 2}, **data}
    return load_examples(load_config({"model": {"name": "x"}, "data": content, "method": {"name": "fedit"}}))


def rows(examples: Examples) -> list[tuple[str, str]]:
    assert examples.train is not None
    assert examples.label_names is not None
    return [(row["text"], examples.label_names[row["label"]]) for row in examples.train]


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


READ: dict[str, tuple[str, str | bytes, list[tuple[str, str]]]] = {
    "byte-order mark": ("a.csv", "\ufeff" + CSV, []),
    "UTF-16": ("a.csv", CSV.encode("utf-16"), []),
    "CR": ("a.csv", CSV.replace("\n", "\r"), []),
    "CR LF": ("a.csv", CSV.replace("\n", "\r\n"), []),
    "mixed ends": ("a.csv", CSV.replace("3,pos\n", "3,pos\r\n"), []),
    "blank lines": ("a.csv", CSV.replace("3,pos\n", "3,pos\n\n   \n"), []),
    "a last line without an end": ("a.csv", CSV[:-1], []),
    "lines within quotes": (
        "a.csv",
        CSV + '"Dear, all\nbest, me",pos\n"one\n\nthree",neg\n',
        [("Dear, all\nbest, me", "pos"), ("one\n\nthree", "neg")],
    ),
    "doubled quotes": ("a.csv", CSV + '"he said ""hi"", then",pos\n', [('he said "hi", then', "pos")]),
    "a quote within a cell": ("a.csv", CSV + 'a 12" disc,pos\n', [('a 12" disc', "pos")]),
    "a long cell": ("a.csv", CSV + "x" * 200_000 + ",pos\n", [("x" * 200_000, "pos")]),
    "semicolons": ("a.csv", CSV.replace(",", ";"), []),
    "tabs in a .csv": ("a.csv", CSV.replace(",", "\t"), []),
    "delimiters at every end": ("a.csv", CSV.replace("\n", ",\n"), []),
    "spaces in the header": ("a.csv", CSV.replace("text,label", " text , label "), []),
    "words that look missing": (
        "a.csv",
        CSV + "NA,pos\nnull,neg\nNone,NaN\n",
        [("NA", "pos"), ("null", "neg"), ("None", "NaN")],
    ),
    "leading zeros": ("a.csv", CSV.replace("pos", "007").replace("neg", "7"), []),
    "gzip": ("a.csv.gz", gzip.compress(CSV.encode()), []),
    "blank lines in JSON": ("a.jsonl", JSONL.replace("\n", "\n\n"), []),
    "JSON lines that end with CR": ("a.jsonl", JSONL.replace("\n", "\r"), []),
    "an array": ("a.jsonl", json.dumps(OBJECTS, indent=1), []),
    "another type in an unused column": ("a.jsonl", UNLIKE_IDS, []),
}


@pytest.mark.parametrize("what", READ)
def test_it_is_read_right(what: str, tmp_path: Path) -> None:
    name, content, more = READ[what]
    known = {"007": "pos", "7": "neg"}
    found = [(text, known.get(label, label)) for text, label in rows(load(put(tmp_path, name, content)))]
    assert found == ROWS + more


REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "Latin-1": ("a.csv", (CSV + "café,pos\n").encode("latin-1"), "line 12: byte 0xe9"),
    "a NUL": ("a.csv", CSV + "a\0b,pos\n", "line 12: a NUL"),
    "two stray quotes": ("a.csv", CSV.replace("word 3", '"word 3').replace("word 6", 'word 6"'), "lines 5 to 8"),
    "two stray quotes in a TSV": (
        "a.tsv",
        CSV.replace(",", "\t").replace("word 3", '"word 3').replace("word 6", '"word 6'),
        "lines 5 to 8",
    ),
    "stray quotes beside a number": (
        "a.csv",
        "id,text,label\n" + STRAY.replace("Q", '"'),
        "lines 5 to 8",
    ),
    "a quote that stays open": ("a.csv", CSV + '"oops,pos\na,neg\n', "lines 12 to 13: a quote is opened"),
    "backslashes before quotes": ("a.csv", CSV + '"he said \\"hi\\"",pos\n', "line 12"),
    "text after a quote": ("a.csv", CSV + '"good" movie,pos\n', "line 12"),
    "more cells": ("a.csv", CSV + "a,b,pos\n", "line 12 has 3 cells, the header has 2"),
    "fewer cells": ("a.csv", CSV + '"a\nb"\n', "lines 12 to 13 has 1 cell"),
    "a header alone": ("a.csv", "text,label\n", "holds no rows"),
    "two columns of a name": ("a.csv", CSV.replace("text,label", "text,text"), "several columns"),
    "no label": ("a.csv", CSV.replace("4,neg", "4,"), "line 6 of a.csv has no label"),
    "a fraction": ("a.csv", CSV.replace("pos", "1").replace("neg", "2") + "x,1.5\n", "line 12 of a.csv holds"),
    "a text that is a number": (
        "a.jsonl",
        JSONL + '{"text": 1, "label": "pos"}\n',
        "line 11 of a.jsonl holds the int 1",
    ),
    "a text that is a list": (
        "a.jsonl",
        JSONL + '{"text": ["x"], "label": "pos"}\n',
        "line 11 of a.jsonl holds the list",
    ),
    "a broken line": ("a.jsonl", JSONL + '{"text": "x", \n', "line 11, column"),
    "a key twice": ("a.jsonl", JSONL + '{"text": "x", "text": "y", "label": "pos"}\n', "line 11 names a column twice"),
    "half a pair": (
        "a.jsonl",
        JSONL + '{"text": "\\ud800", "label": "pos"}\n',
        "line 11 holds half of a surrogate pair",
    ),
    "a label that is NaN": ("a.jsonl", JSONL + '{"text": "x", "label": NaN}\n', "line 11 of a.jsonl has no label"),
    "half a gzip": ("a.csv.gz", gzip.compress(CSV.encode())[:-9], "data.name"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_with_its_line(what: str, tmp_path: Path) -> None:
    name, content, said = REFUSED[what]
    with pytest.raises(InputError) as caught:
        load(put(tmp_path, name, content))
    assert said in str(caught.value)


def test_what_is_read_otherwise_than_one_might_think_is_noted(tmp_path: Path) -> None:
    def notes(content: str, name: str = "a.csv") -> str:
        return " | ".join(load(put(tmp_path, name, content)).notes)

    assert notes(CSV) == ""
    assert "'Pos' and 'pos' are separate classes" in notes(CSV + "x,Pos\n")
    assert "'pos' and ' pos' are one class" in notes(CSV + "x, pos\n")
    numbers = CSV.replace("pos", "1").replace("neg", "2")
    assert notes(numbers) == ""
    assert "'1' and '1.0' are one class" in notes(numbers + "x,1.0\n")
    assert "1 and '1' and 1.0 are one class" in notes(
        lines([{"text": f"w {i}", "label": [1, "1", 1.0, 2][i % 4]} for i in range(12)]), "a.jsonl"
    )
    assert "1 of 11 rows have no text and are left out (line 12)" in notes(CSV + " ,pos\n")
    assert "separated by semicolons" in notes(CSV.replace(",", ";"))


@pytest.mark.parametrize("kind", ["dictionary", "large_string"])
def test_parquet_types_of_text_are_text(kind: str, tmp_path: Path) -> None:
    texts: Any = pa.array([text for text, _ in ROWS])
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(pa.large_string())
    pq.write_table(pa.table({"text": texts, "label": texts.cast(pa.string())}), tmp_path / "a.parquet")
    assert rows(load(tmp_path / "a.parquet")) == [(text, text) for text, _ in ROWS]


def test_a_parquet_file_has_no_columns_of_its_folders(tmp_path: Path) -> None:
    (tmp_path / "label=1").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "label=1" / "a.parquet")
    with pytest.raises(InputError, match=r"there is no such column; columns: text$"):
        load(tmp_path / "label=1" / "a.parquet")


def test_a_format_of_data_in_memory_counts_by_its_columns_and_a_transform_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    source = datasets.Dataset.from_dict({"text": [t for t, _ in ROWS], "label": [c for _, c in ROWS], "more": [1] * 10})
    assert rows(load(materialise(source.with_format("numpy")))) == ROWS
    with pytest.raises(InputError, match="no such column; columns: text, more"):
        load(materialise(source.with_format("torch", columns=["text", "more"])))
    with pytest.raises(InputError, match=r"has a transform .* apply it first with map"):
        materialise(source.with_transform(lambda batch: {"text": batch["label"], "label": batch["label"]}))


@pytest.mark.parametrize(
    "name", ["x" * 100_000, "x" * 300, "a\0b", "a\nb", "loop", "gone", "pipe", "/dev/zero", "\udc80"]
)
@pytest.mark.parametrize("key", ["name", "test", "public"])
def test_a_path_that_leads_nowhere_is_one_line(
    name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nothing")
    os.mkfifo("pipe")
    with pytest.raises(InputError) as caught:
        load(put(tmp_path, "a.csv", CSV), **{key: name})
    assert caught.value.field == f"data.{key}"
    assert len(str(caught.value)) < 500
