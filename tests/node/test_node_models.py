"""What a node loads is what its owner listed, down to the bytes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import ModelSection
from fedlora.errors import InputError, PolicyError
from fedlora.node.config import load_node
from fedlora.node.policy import admitted_model, folder_digest
from tests.command import fedlora
from tests.owner import listed, write_node

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "clinic" / "model"
    (folder / "more").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "more" / "weights").write_bytes(b"123")
    return folder


def admit(tmp_path: Path, entries: list[dict[str, str]], **asked: Any) -> ModelSection:
    node = load_node(write_node(tmp_path / "clinic", tmp_path, policy={"models": entries}))
    return admitted_model(node.policy, ModelSection(**asked))


def test_assets_need_no_entry_and_all_else_does(tmp_path: Path, model: Path) -> None:
    assert admit(tmp_path, [], name="asset:minilm-l6", revision="main").revision is None
    for name in ("asset:rotten-tomatoes", "asset:none"):
        with pytest.raises(InputError):
            admit(tmp_path, [], name=name)
    for name in (str(model), "model", "bert-base-uncased"):
        with pytest.raises(PolicyError, match="models = 0"):
            admit(tmp_path, [], name=name)


def test_a_hub_id_is_loaded_at_the_owners_commit(tmp_path: Path) -> None:
    entries = [{"name": "someone/bert", "revision": COMMIT}]
    for revision in (None, COMMIT):
        assert admit(tmp_path, entries, name="someone/bert", revision=revision).revision == COMMIT
    for other in ({"name": "someone/bert", "revision": "main"}, {"name": "someone/Bert"}, {"name": "someone/bert/"}):
        with pytest.raises(PolicyError, match="models = 1"):
            admit(tmp_path, entries, **other)


def test_a_folder_is_where_the_owner_says_and_what_it_was(tmp_path: Path, model: Path) -> None:
    digest = folder_digest(model)
    for entry in ({"name": "model"}, {"name": str(model)}, {"name": "someone/bert", "path": "model"}):
        found = admit(tmp_path, [{**entry, "sha256": digest}], name=entry["name"])
        assert Path(found.name) == model
    entries = [{"name": "model", "sha256": digest}]
    with pytest.raises(PolicyError):
        admit(tmp_path, entries, name="model", revision=COMMIT)
    (model / "more" / "weights").write_bytes(b"124")
    with pytest.raises(InputError, match=r"policy\.models = 'model': its files have the SHA-256"):
        admit(tmp_path, entries, name="model")
    (model / "more" / "weights").write_bytes(b"123")
    assert Path(admit(tmp_path, entries, name="model").name) == model
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter"):
        admit(tmp_path, [{"name": "model", "sha256": folder_digest(model)}], name="model")
    with pytest.raises(InputError, match="there is no folder"):
        admit(tmp_path, [{"name": "gone", "sha256": digest}], name="gone")


def test_the_digest_is_that_of_every_name_and_byte(model: Path) -> None:
    before = folder_digest(model)
    shell = "find * -type f | LC_ALL=C sort | xargs sha256sum | sha256sum"
    assert subprocess.check_output(shell, shell=True, cwd=model, text=True).split()[0] == before
    (model / "config.json").rename(model / "Config.json")
    assert folder_digest(model) != before
    for folder in (model / "none", model / "Config.json"):
        with pytest.raises(InputError, match="FOLDER"):
            folder_digest(folder)


@pytest.mark.parametrize(
    ("entry", "field", "part"),
    [
        ({"name": "a/b"}, "policy.models.0", "give revision"),
        ({"name": "a/b", "revision": COMMIT, "sha256": "0" * 64}, "policy.models.0", "give revision"),
        ({"name": "a/b", "revision": "main"}, "policy.models.0.revision", "40 hexadecimal digits"),
        ({"name": "a/b", "revision": COMMIT[:7]}, "policy.models.0.revision", "40 hexadecimal digits"),
        ({"name": "a/b", "sha256": "x" * 64}, "policy.models.0.sha256", "fedlora digest FOLDER"),
        ({"name": "asset:minilm-l6", "revision": COMMIT}, "policy.models.0.name", "pinned by fedlora"),
        ({"revision": COMMIT}, "policy.models.0.name", "is required"),
        ({"name": "a/b", "revison": COMMIT}, "policy.models.0.revison", "did you mean revision?"),
        ({"name": 3, "revision": COMMIT}, "policy.models.0.name", "3"),
    ],
)
def test_a_mistake_in_an_entry_is_named(tmp_path: Path, entry: dict[str, Any], field: str, part: str) -> None:
    with pytest.raises(InputError) as error:
        admit(tmp_path, [entry], name="a/b")
    assert error.value.field == field
    assert part in str(error.value)
    with pytest.raises(InputError, match=r"policy\.models\.1\.name = 'a': is listed twice"):
        admit(tmp_path, [{"name": "a", "revision": COMMIT}] * 2, name="a")


def test_the_command_prints_an_entry(tmp_path: Path, model: Path) -> None:
    done = fedlora("digest", model)
    assert done.code == 0
    path = write_node(tmp_path / "clinic", tmp_path)
    path.write_text(path.read_text().replace("[policy]\n", f"[policy]\nmodels = [{done.out.strip()}]\n"))
    (entry,) = load_node(path).policy.models
    assert [{"name": entry.name, "sha256": entry.sha256}] == listed(model)
    done = fedlora("digest", tmp_path / "none")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
