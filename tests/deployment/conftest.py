"""Examples of three owners in three formats, and one federation of their nodes for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.config import load_config
from fedlora.data.sources import load_examples
from tests.deployment.federation import Federation

SIZES = {"east": 60, "north": 90, "west": 50}


@pytest.fixture(scope="session")
def examples(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with east.csv, north.jsonl and west.parquet; all.csv, which says whose each row is; and test.csv."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FEDLORA_CACHE", str(cache))
        config = {
            "model": {"name": "asset:minilm-l6"},
            "data": {
                "name": "asset:rotten-tomatoes", "max_examples": sum(SIZES.values()), "max_test_examples": 60,
                "partition": {"clients": 1},
            },
            "method": {"name": "fed-sb"},
        }  # fmt: skip
        loaded = load_examples(load_config(config))
    names = loaded.label_names
    assert names is not None
    assert loaded.train is not None
    assert loaded.test is not None
    tables = {"all": loaded.train.to_pandas()[["text", "label"]], "test": loaded.test.to_pandas()[["text", "label"]]}
    for table in tables.values():
        table["label"] = [names[label] for label in table["label"]]
    tables["test"].to_csv(folder / "test.csv", index=False)
    tables["all"]["owner"] = [name for name, size in SIZES.items() for _ in range(size)]
    tables["all"].to_csv(folder / "all.csv", index=False)
    own = {name: rows.drop(columns="owner") for name, rows in tables["all"].groupby("owner")}
    own["east"].to_csv(folder / "east.csv", index=False)
    own["north"].to_json(folder / "north.jsonl", orient="records", lines=True)
    own["west"].to_parquet(folder / "west.parquet", index=False)
    return folder


@pytest.fixture(scope="session")
def federation(examples: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server and three nodes with TLS and authentication; whatever was started is gone at the end."""
    data = {"east": examples / "east.csv", "north": examples / "north.jsonl", "west": examples / "west.parquet"}
    running = Federation(tmp_path_factory.mktemp("federation"), data, cache)
    with running:
        yield running
    assert running.left() == []
