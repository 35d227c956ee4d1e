"""Whose each example is: read, kept through tokenising, held out by person, and left out beyond a number."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import Config, load_config
from fedlora.data.sources import UNIT_COLUMN, load_examples
from fedlora.data.tokens import FederatedData, prepare_data
from fedlora.data.units import at_most
from fedlora.errors import InputError
from tests import tiny
from tests.persons import HEAVY, SIZES, write_persons


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("persons")
    tiny.bert_config().save_pretrained(made / "bert")
    tiny.save_tokenizer(made / "bert")
    write_persons(made / "train.jsonl")
    return made


@pytest.fixture(autouse=True)
def _cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(folder / "cache"))


def config(folder: Path, privacy: dict[str, Any] | None = None, **data: Any) -> Config:
    private = {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-3, "unit": "author"}
    partition = {"kind": "natural", "column": "clinic"}
    return load_config(
        {
            "model": {"name": str(folder / "bert"), "max_length": 10},
            "data": {"name": str(folder / "train.jsonl"), "partition": partition, **data},
            "method": {"name": "fedit"},
            "privacy": private | (privacy or {}),
        }
    )


def authors(folder: Path) -> dict[str, str]:
    """Author by text."""
    rows = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    return {row["text"]: row["author"] for row in rows}


def persons(data: FederatedData, client: int) -> Counter[int]:
    assert data.train.units is not None
    return Counter(np.asarray(data.train.units[data.partition[client]]).tolist())


@pytest.mark.parametrize("mode", ["example", "none"])
def test_what_is_held_out_is_of_other_persons(folder: Path, mode: str) -> None:
    """Also without privacy, so that a run of one sort can be compared with one of the other."""
    examples = load_examples(config(folder, {"mode": mode}, validation=0.1))
    assert examples.train is not None
    assert examples.test is not None
    assert examples.validation is not None
    of = authors(folder)
    tables = {"train": examples.train, "test": examples.test, "validation": examples.validation}
    held = {name: {of[text] for text in table["text"]} for name, table in tables.items()}
    assert sum(map(len, held.values())) == len(SIZES)
    assert not held["train"] & held["test"]
    assert not held["train"] & held["validation"]
    assert not held["test"] & held["validation"]
    assert len(examples.test) >= sum(SIZES.values()) // 10
    assert UNIT_COLUMN not in examples.test.column_names
    numbers = dict(zip(map(of.__getitem__, examples.train["text"]), examples.train[UNIT_COLUMN], strict=True))
    assert len(set(numbers.values())) == len(held["train"])  # a number a person


def test_a_client_holds_out_persons_of_its_own(folder: Path) -> None:
    data = prepare_data(config(folder, client_test=0.2, test=str(folder / "train.jsonl")))
    assert data.client_test is not None
    assert data.train.units is not None
    for client in range(2):
        tested = set(np.asarray(data.train.units[data.client_test[client]]).tolist())
        assert tested
        assert not tested & set(persons(data, client))


def test_steps_draw_persons_and_the_largest_one_counts_once(folder: Path) -> None:
    uls = config(folder, test=str(folder / "train.jsonl"))
    data = prepare_data(uls)
    counted = [persons(data, client) for client in range(2)]
    assert data.drawn_sizes(uls.privacy) == [len(found) for found in counted]
    assert data.units_of(0, uls.privacy) is None
    assert max(max(found.values()) for found in counted) == SIZES[HEAVY]
    assert "author names 41 persons; the median has 3 examples, the largest 500" in data.notes
    assert any("persons have examples at several clients" in note for note in data.notes)
    assert sum(data.typical_units()) == sum(sorted(counted, key=len)[1].values())


def test_examples_beyond_the_number_are_left_out(folder: Path) -> None:
    els = config(folder, {"user_mechanism": "els", "examples_per_unit": 3}, test=str(folder / "train.jsonl"))
    data, whole = prepare_data(els), prepare_data(config(folder, test=str(folder / "train.jsonl")))
    assert data.folder == whole.folder  # they share the tokens
    for client in range(2):
        kept, there = persons(data, client), persons(whole, client)
        assert kept == {person: min(3, count) for person, count in there.items()}
        assert set(data.partition[client]) <= set(whole.partition[client])
        assert data.drawn_from(client, els.privacy) == sum(kept.values())
        assert data.units_of(client, els.privacy) == len(kept)


def test_no_person_is_left_to_train_on(folder: Path, tmp_path: Path) -> None:
    write_persons(tmp_path / "one.jsonl", {"ann": 30})
    with pytest.raises(InputError, match="too few persons") as caught:
        load_examples(config(folder, name=str(tmp_path / "one.jsonl")))
    assert caught.value.field == "privacy.unit"


@pytest.mark.parametrize(("unit", "remedy"), [("person", "there is no such column"), ("text", None)])
def test_the_column_of_the_persons_is_checked(folder: Path, unit: str, remedy: str | None) -> None:
    given = config(folder, {"unit": unit})
    if remedy is None:
        load_examples(given)
        return
    with pytest.raises(InputError, match=remedy) as caught:
        load_examples(given)
    assert caught.value.field == "privacy.unit"


def test_a_row_of_nobody_is_named(folder: Path, tmp_path: Path) -> None:
    rows = (folder / "train.jsonl").read_text().splitlines()
    rows[4] = json.dumps({**json.loads(rows[4]), "author": None})
    (tmp_path / "lost.jsonl").write_text("\n".join(rows))
    with pytest.raises(InputError, match=r"line 5 of lost\.jsonl has") as caught:
        load_examples(config(folder, name=str(tmp_path / "lost.jsonl")))
    assert caught.value.field == "privacy.unit"


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 6), st.integers(0, 9))
def test_up_to_so_many_of_each(units: list[int], most: int, seed: int) -> None:
    places = at_most(np.array(units, np.int64), most, [seed])
    assert sorted(set(places.tolist())) == places.tolist()
    kept = Counter(units[place] for place in places)
    assert kept == {unit: min(most, count) for unit, count in Counter(units).items()}
    # Who else is there changes nothing.
    others = [place for place, unit in enumerate(units) if unit != 0]
    alone = at_most(np.array([units[place] for place in others], np.int64), most, [seed])
    assert [others[place] for place in alone] == [place for place in places if units[place] != 0]
