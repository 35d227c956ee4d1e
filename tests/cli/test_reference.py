"""``fedlora config`` and ``fedlora methods --json``: every key and method, and what there is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedlora.cli.reference import METHODS_HEAD
from fedlora.config import Config, all_keys
from fedlora.methods import methods
from tests.command import fedlora
from tests.configs import KEYS


def test_every_key_is_listed_with_its_default_and_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = all_keys({name: method.Options for name, method in methods().items()})
    assert {key.name for key in keys} == set(KEYS)
    assert all(key.type and key.description for key in keys)
    done = fedlora("config")
    assert done.code == 0
    words = " ".join(done.out.split())
    for section in (*Config.model_fields, "data.partition"):
        assert f"[{section}]" in words
    assert not re.search(r":\w+:`", words), "a role of Sphinx is no text for a terminal"
    for name in methods():
        has_options = any(key.method == name for key in keys)
        assert (f"(method.name = {name})" in words) == has_options


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("method.rank", ["integer", ">= 1", "default 8", "Rank r of the adapters."]),
        ("method.init", ["fed-sb", '"svd" | "public" | "pooled"', 'default "svd"']),
        ("method.alpha", ["number", ">= 0.0001 and <= 1000000.0", "default none"]),
        ("model.name", ["text", "default required"]),
        ("data.partition.kind", ['"dirichlet"', 'default "iid"']),
        ("simulation.cohort_size", ['integer | "auto"']),
    ],
)
def test_one_key_is_described(key: str, told: list[str]) -> None:
    done = fedlora("config", key)
    words = " ".join(done.out.split())
    assert done.code == 0
    assert words.startswith(key)
    assert all(text in words for text in told)


def test_a_section_is_described_with_what_lies_below_it() -> None:
    out = fedlora("config", "data").out
    assert "label_names" in out
    assert "[data.partition]" in out
    assert "[model]" not in out


@pytest.mark.parametrize(
    ("key", "meant"),
    [("method.rnk", "method.rank"), ("rank", "method.rank"), ("methd", "method"), ("inti", "method.init")],
)
def test_an_unknown_key_is_answered_with_the_right_one(key: str, meant: str) -> None:
    done = fedlora("config", key)
    assert done.code == 2
    assert f"did you mean {meant}?" in done.err
    assert len(done.err.splitlines()) == 1


def test_methods_are_told_as_json() -> None:
    done = fedlora("methods", "--json")
    assert done.code == 0
    told = {row["name"]: row for row in json.loads(done.out)}
    assert set(told) == set(methods())
    for name, method in methods().items():
        row = told[name]
        assert set(row) == {"name", "title", "paper", "exact", "mixed_ranks", "dp", "options"}
        assert (row["exact"], row["mixed_ranks"], row["dp"]) == (method.exact, method.mixed_ranks, method.dp)
    assert told["fedit"]["options"] == []
    assert "init" in told["fed-sb"]["options"]


def test_pages_on_methods_say_what_their_files_say() -> None:
    """docs/methods.md, and the table in README; other packages' methods may be installed beside."""
    root = Path(__file__).resolve().parents[2]
    done = fedlora("methods", "--markdown")
    assert done.code == 0, done.err
    told = set(done.out.splitlines())
    page = (root / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    assert set(page) <= told, "write it again: fedlora methods --markdown > docs/methods.md"
    begin = page.index(METHODS_HEAD.splitlines()[0])
    first, second = page[begin : page.index("", begin)], page[page.index("", begin) :]
    table = [line for line in first if line.startswith("| `")]
    assert len(table) == len([line for line in second if line.startswith("| `")]) >= 14
    assert all(row.split(" | ")[2] for row in table), "a method does not say what it sends"
    readme = (root / "README.md").read_text(encoding="utf-8").splitlines()
    begin = readme.index(first[0])
    assert readme[begin : readme.index("", begin)] == first, "copy the table of docs/methods.md"
