"""Sources, splits and columns that are not there are told from headers alone, before anything is loaded."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.assets import ASSETS, find_model
from fedlora.config import Config, load_config
from fedlora.data import origins
from fedlora.data.files import read_file, read_header
from fedlora.data.sources import check_sources
from fedlora.data.tokens import prepare_data
from fedlora.errors import InputError

CSV = "text,label,clinic\nfine,good,north\nlate,bad,south\n"
ROWS: list[dict[str, Any]] = [{"text": "fine", "label": "good"}, {"text": "late", "label": "bad", "clinic": "south"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)

FILES: dict[str, str | bytes] = {
    "plain.csv": CSV,
    "ends.csv": CSV.replace("\n", "\r\n"),
    "old.csv": CSV.replace("\n", "\r"),
    "semicolons.csv": CSV.replace(",", ";"),
    "tabs.tsv": CSV.replace(",", "\t"),
    "mark.csv": "\ufeff\n\n" + CSV,
    "wide.csv": CSV.encode("utf-16"),
    "packed.csv.gz": gzip.compress(CSV.encode()),
    "lines.csv": 'text,"label\nof the review",clinic,\nfine,good,north,\n',
    "semicolons and lines.csv": 'text;"label\nof the review";clinic\nfine;good;north\n',
    "twice.csv": "text,text\na,b\n",
    "rows.jsonl": "\n" + JSONL,
    "packed.jsonl.gz": gzip.compress(JSONL.encode()),
    "array.json": "\n" + json.dumps(ROWS, indent=1),
}


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def config(folder: Path, **changes: Any) -> Config:
    put(folder, "a.csv", CSV)
    content: dict[str, Any] = {
        "model": {"name": "x"},
        "data": {"name": str(folder / "a.csv"), "partition": {"clients": 2}},
        "method": {"name": "fedit"},
    }
    return load_config(content, {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize("name", FILES)
def test_a_header_names_the_columns_that_the_whole_file_has(name: str, tmp_path: Path) -> None:
    path = put(tmp_path, name, FILES[name])
    whole = read_file(path)
    header = read_header(path, wanted=list(whole.columns))
    assert (list(header.columns), header.repeated) == (list(whole.columns), whole.repeated)


def test_a_header_of_parquet_is_its_schema(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(read_header(tmp_path / "a.parquet").columns) == ["text", "label"]


@pytest.mark.parametrize("splits", [True, False])
def test_a_folders_header_is_that_of_its_splits(splits: bool, tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS).with_format("numpy", columns=["text"])
    (datasets.DatasetDict({"train": table, "dev": table}) if splits else table).save_to_disk(tmp_path / "saved")
    loaded = origins.load_tables(str(tmp_path / "saved"), "data.name")
    found = origins.load_headers(str(tmp_path / "saved"), "data.name", set())
    assert found is not None
    assert {name: list(header.columns) for name, header in found.items()} == {name: ["text"] for name in loaded}


@pytest.mark.parametrize("name", ["rotten-tomatoes", "20newsgroups", "reuters-r8"])
def test_an_assets_header_is_what_its_files_give(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    loaded = origins.load_tables(f"asset:{name}", "data.name")
    found = origins._asset_headers(ASSETS[name])
    assert found is not None
    assert {s: list(t.columns) for s, t in found.items()} == {s: list(t.columns) for s, t in loaded.items()}


def test_no_more_is_read_than_the_header(tmp_path: Path) -> None:
    check_sources(config(tmp_path, data__name=str(put(tmp_path, "b.csv", CSV + 'broken,"cell\n'))))
    check_sources(config(tmp_path, data__name=str(put(tmp_path, "b.jsonl", JSONL + "{broken\n"))))


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "text": ({"data.text": "txt"}, "data.text", "no such column; columns: text, label, clinic"),
    "label": ({"data.label": "lable"}, "data.label", "no such column"),
    "pair": ({"data.text_pair": "title"}, "data.text_pair", "no such column"),
    "owner": ({"data.partition.column": "hospital"}, "data.partition.column", "no such column"),
    "person": (
        {"privacy.unit": "patient", "privacy.mode": "example", "privacy.noise_multiplier": 1.0},
        "privacy.unit",
        "no such column",
    ),
    "prompt": (
        {"model.task": "causal-lm", "data.prompt": "question", "data.answer": "label"},
        "data.prompt",
        "no such column",
    ),
    "messages": ({"model.task": "causal-lm", "data.messages": "turns"}, "data.messages", "no such column"),
    "missing file": ({"data.name": "nowhere.csv"}, "data.name", "no such file or folder"),
    "no format": ({"data.name": "a.xlsx"}, "data.name", "cannot be read (its format is unknown"),
    "empty file": ({"data.name": "empty.csv"}, "data.name", "holds no rows"),
    "unknown asset": ({"data.name": "asset:rotten"}, "data.name", "asset"),
    "asset's column": ({"data.name": "asset:rotten-tomatoes", "data.text": "review"}, "data.text", "label, movie"),
    "no split to train on": ({"data.train": "training"}, "data.train", "no split 'training'"),
    "no test file": ({"data.test": "tests.csv"}, "data.test", "is no split (splits: train) and no file"),
    "no validation": ({"data.validation": "dev"}, "data.validation", "is no split"),
    "no public file": ({"data.public": "public.csv"}, "data.public", "is no split"),
    "a test file of other columns": ({"data.test": "other.csv"}, "data.label", "no such column in other.csv; columns"),
    "a test file beside data of the hub": (
        {"data.name": "somebody/texts", "data.test": "other.csv"},
        "data.label",
        "no such column in other.csv",
    ),
    "a part of a file": ({"data.subset": "mnli"}, "data.subset", "is none; leave it out"),
    "a late key": ({"data.name": "rows.jsonl", "data.text": "txt"}, "data.text", "columns: text, label, clinic"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_there_is_named_with_its_key(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "a.xlsx": CSV,
        "empty.csv": "",
        "other.csv": "text,clinic\na,b\n",
        "rows.jsonl": JSONL,
    }.items():
        put(tmp_path, name, content)
    monkeypatch.setattr(origins, "read_file", None)
    changes, field, said = WRONG[what]
    with pytest.raises(InputError) as caught:
        check_sources(config(tmp_path, **changes))
    assert caught.value.field == field
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data.name": "somebody/texts", "data.test": "dev", "data.text": "review"},
        {"data.name": "rows.jsonl", "data.partition.column": "clinic"},
        {"data.name": "asset:20newsgroups", "data.partition.column": "domain", "data.validation": "test"},
        {"data.name": "nodes", "data.test": "a.csv", "privacy.unit": "patient"},
    ],
)
def test_what_only_loading_can_tell_is_left_to_it(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "rows.jsonl", JSONL)
    check_sources(config(tmp_path, **changes))


def test_the_model_is_not_fetched_before_the_data_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.data.tokens.model_config", None)
    with pytest.raises(InputError, match=r"^data\.text = 'txt'"):
        prepare_data(config(tmp_path, data__text="txt"))


@pytest.mark.parametrize("name", ["asset:minilm", "asset:rotten-tomatoes", "./no/such/folder", "a.csv"])
def test_a_model_that_is_not_there_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a.csv", CSV)
    with pytest.raises(InputError, match=r"^model\.name = "):
        find_model(name)
