"""``fedlora config`` and ``fedlora methods --json``: every key and method, and what there is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedlora.cli.reference import METHODS_HEAD, config_page, readers
from fedlora.config import Config, all_keys
from fedlora.methods import methods
from tests.command import fedlora
from tests.configs import KEYS


def test_every_key_is_listed_with_its_default_and_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = all_keys({name: method.Options for name, method in methods().items()})
    assert {key.name for key in keys} == set(KEYS)
    assert all(key.type and key.description for key in keys)
    done = fedlora("config", "--all")
    assert done.code == 0
    for key in keys:  # in a pipe a line each
        assert re.search(rf"^{key.last} .*{re.escape(key.type)} +{re.escape(key.description)}$", done.out, re.MULTILINE)
    words = " ".join(done.out.split())
    for section in (*Config.model_fields, "data.partition"):
        assert f"[{section}]" in words
    assert not re.search(r":\w+:`", words), "a role of Sphinx is no text for a terminal"
    for name in methods():
        has_options = any(key.method == name for key in keys)
        assert (f"(method.name = {name})" in words) == has_options


def test_alone_it_lists_the_sections_and_says_how_to_see_more() -> None:
    done = fedlora("config")
    assert done.code == 0
    keys = all_keys({})
    rows = {line.split()[0]: line.split()[1] for line in done.out.partition("\n\n")[0].splitlines()[1:]}
    assert rows == {section: str(sum(key.section == section for key in keys)) for section in {k.section for k in keys}}
    told = [line.partition("as in: ")[2] for line in done.out.splitlines() if "as in: " in line]
    assert len(told) == 2
    for command in told:
        program, *words = command.split()
        assert program == "fedlora"
        assert fedlora(*words).code == 0


def test_every_key_has_a_meaning_a_default_and_readers_in_the_reference() -> None:
    """A key without one of them fails here by its name."""
    found = methods()
    keys = all_keys({name: method.Options for name, method in found.items()})
    page = config_page(keys, found)
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in page.splitlines()]
    told = [row for row in rows if row and re.fullmatch(r"`\w+`", row[0])]
    assert [row[0].strip("`") for row in told] == [key.last for key in keys]
    for key, (_, meaning, kind, default, unit, read_by) in zip(keys, told, strict=True):
        assert len(meaning.split()) >= 2, f"{key.name} says nothing in its description"
        assert meaning[0].isupper(), key.name
        assert meaning.endswith((".", ")")), key.name
        assert kind, key.name
        assert read_by, key.name
        assert (unit, default.strip("`")) == (key.unit, key.default)
        if not default and not key.method:
            assert re.search("None|Optional", str(KEYS[key.name])), (
                f"{key.name} has neither a default nor the choice of none"
            )


def test_keys_that_measure_something_name_their_unit() -> None:
    keys = all_keys({name: method.Options for name, method in methods().items()})
    for key in keys:
        measures = re.search(r"_(mbps|ms|gb|seconds|tokens)$", key.name) or re.search(
            r"\b(seconds|milliseconds|bit/s|in tokens)\b", key.description, re.IGNORECASE
        )
        if measures and ("integer" in key.type or "number" in key.type):
            assert key.unit, f"{key.name} needs json_schema_extra={{'unit': ...}}"
    assert {key.unit for key in keys} >= {"seconds", "milliseconds", "tokens", "rounds", "examples", "10^6 bit/s"}


@pytest.mark.parametrize(
    ("key", "read_by"),
    [
        ("run.seed", "all methods"),
        ("method.dropout", "all methods but peft"),
        ("method.target_modules", "all methods but flexmore"),
        ("model.quantization", "all methods but flexmore, peft"),
        ("method.init_examples", "fed-sb"),
        ("data.long_texts", "all methods; tasks causal-lm"),
    ],
)
def test_a_key_says_who_reads_it(key: str, read_by: str) -> None:
    found = methods()
    (one,) = (k for k in all_keys({name: method.Options for name, method in found.items()}) if k.name == key)
    assert readers(one, found) == read_by
    done = fedlora("config", key)
    assert f"read by  {read_by}" in " ".join(done.out.split("\n"))


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("server.timeout", ["unit seconds", "default 3600.0", "read by all methods"]),
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
