"""node.toml: what is read, and that every mistake is one line that names the key."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import InputError
from fedlora.node.config import NodeConfig, load_node
from tests.configs import keys, put, text, wrong_values

BASE: dict[str, Any] = {
    "name": "clinic",
    "superlink": {"address": "127.0.0.1:8000", "root_certificates": "keys/ca.crt", "private_key": "keys/clinic"},
    "data": {"path": "notes.csv"},
    "policy": {"max_epsilon": 3.0},
}
NODE_KEYS = dict(keys(NodeConfig))


def write(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "notes.csv").write_text("text,label\na,b\n")
    path = folder / "node.toml"
    path.write_text(tomli_w.dumps(content))
    return path


def changed(key: str, value: Any) -> dict[str, Any]:
    content = {name: dict(part) if isinstance(part, dict) else part for name, part in BASE.items()}
    put(content, key, value)
    return content


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    node = load_node(write(tmp_path, BASE))
    assert node.data.path == str(tmp_path / "notes.csv")
    assert node.superlink.root_certificates == str(tmp_path / "keys" / "ca.crt")
    assert node.superlink.private_key == str(tmp_path / "keys" / "clinic")
    assert node.directory == tmp_path / "state"
    assert node.cache == tmp_path / "state" / "cache"
    assert node.format == "csv"
    assert load_node(write(tmp_path, changed("state.cache", "/elsewhere"))).cache == Path("/elsewhere")


def test_a_format_may_be_said(tmp_path: Path) -> None:
    (tmp_path / "notes.dat").write_text("text\tlabel\n")
    content = changed("data.path", "notes.dat")
    with pytest.raises(InputError, match=r"data\.path = .*data\.format"):
        load_node(write(tmp_path, content))
    content["data"]["format"] = "tsv"
    assert load_node(write(tmp_path, content)).format == "tsv"


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("superlink.addres", "a:1", ["superlink.addres", "did you mean address?"]),
        ("superlink.address", "https://server", ["superlink.address", "https://server"]),
        ("superlink.port", 70000, ["superlink.port", "70000"]),
        ("name", "../clinic", ["name", "../clinic", "letters"]),
        ("data.path", "missing.csv", ["data.path", "missing.csv", "no such file"]),
        ("data.format", "xlsx", ["data.format", "xlsx", "'parquet'"]),
        ("data.prompt", "question", ["data.prompt", "answer"]),
        ("policy", {}, ["policy.max_epsilon", "required"]),
        ("policy.max_epsilon", 0.0, ["policy.max_epsilon", "0.0"]),
        ("policy.allow_non_private", True, ["policy.max_epsilon", "3.0", "allow_non_private"]),
        ("policy.max_sample_rate", 1.5, ["policy.max_sample_rate", "1.5"]),
        ("policy.accountant", "gdp", ["policy.accountant", "gdp", "'rdp'"]),
        ("worker.device", "gpu", ["worker.device", "gpu"]),
        ("worker.idle_seconds", -1.0, ["worker.idle_seconds", "-1.0"]),
        ("state.directory", "", ["state.directory"]),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, key: str, value: Any, parts: list[str]) -> None:
    with pytest.raises(InputError) as error:
        load_node(write(tmp_path, changed(key, value)))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"", b"x = " + b"[" * 5000])
def test_what_is_no_node_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "node.toml").write_bytes(content)
    with pytest.raises(InputError):
        load_node(tmp_path / "node.toml")
    with pytest.raises(InputError, match=r"NODE = .*no such file"):
        load_node(tmp_path / "nowhere.toml")


@given(wrong_values(NODE_KEYS))
def test_a_wrong_value_is_refused_by_its_key(wrong: tuple[str, Any]) -> None:
    key, value = wrong
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(InputError) as error:
            load_node(write(Path(folder), changed(key, value)))
        assert error.value.field == key
        assert "\n" not in str(error.value)


@given(st.sampled_from(["", "data.", "policy.", "state."]), text.filter(bool), st.integers() | text)
def test_an_unknown_key_is_refused(section: str, name: str, value: Any) -> None:
    if section + name in NODE_KEYS or name in BASE or name in ("worker", "state"):
        return
    content = {key: dict(part) if isinstance(part, dict) else part for key, part in BASE.items()}
    (content.setdefault(section[:-1], {}) if section else content)[name] = value
    with tempfile.TemporaryDirectory() as folder, pytest.raises(InputError, match="there is no such key"):
        load_node(write(Path(folder), content))


@given(text)
def test_any_text_as_a_path_is_accepted_or_refused_in_a_line(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), changed("data.path", path))
        field = None
        try:
            assert Path(load_node(file).data.path).is_file()
        except InputError as error:
            field = error.field
        assert field in (None, "data.path")
