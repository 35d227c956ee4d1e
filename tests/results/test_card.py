"""The model card of an exported run, and its upload to a hub that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from fedlora.assets import cache_dir
from fedlora.continuing import adapter_config
from fedlora.results.card import push_to_hub
from fedlora.results.load import export_run
from tests.command import fedlora
from tests.results.test_load import finished_run

SUMMARY: dict[str, Any] = {
    "method": "fed-sb",
    "rounds": 8,
    "clients": 10,
    "trainable_parameters": 1538,
    "epsilon": {
        "max": 7.9997,
        "delta": 1e-5,
        "accountant": "rdp",
        "unit": "one example",
        "covers_init": False,
    },
    "communication": {"initial_bytes": 3001370, "downlink_bytes": 745130, "uplink_bytes": 756800},
    "test_examples": 1280,
    "final": {"accuracy": 0.709375, "loss": 0.59818, "by_class": {}},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    finished_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(SUMMARY))
    return tmp_path / "run"


@pytest.mark.parametrize("merged", [False, True])
def test_the_card_says_what_the_run_did(run: Path, merged: bool) -> None:
    card = (export_run(run, merged=merged) / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["library_name"] == ("transformers" if merged else "peft")
    assert {"federated-learning", "differential-privacy", "fed-sb"} <= set(facts["tags"])
    assert facts["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    for told in (
        "asset:minilm-l6",
        "asset:rotten-tomatoes, of 10 clients",
        "epsilon 8 at delta 1e-05 for one example, by the accountant rdp; the start is not covered",
        "0.8 MB up + 0.7 MB down + 3.0 MB once",
        "on 1,280 test examples | accuracy 0.7094, loss 0.5982",
        "1,538",
    ):
        assert told in text


def test_no_path_of_this_machine_is_in_the_card(run: Path) -> None:
    config = (run / "config.toml").read_text().replace("asset:rotten-tomatoes", str(run / "patients.csv"))
    (run / "patients.csv").write_text("text,label\na,0\n")
    (run / "config.toml").write_text(config)
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"epsilon": None}))
    card = (export_run(run) / "README.md").read_text()
    assert str(run) not in card
    assert "patients" not in card
    assert "data that their owners keep" in card
    assert "| privacy | none |" in card


@pytest.mark.parametrize("pooling", ["default", "mean"])
@pytest.mark.parametrize("merged", [False, True])
def test_no_path_of_the_cache_is_in_what_is_exported(tmp_path: Path, merged: bool, pooling: str) -> None:
    finished_run(tmp_path / "run", pooling=pooling)
    folder = export_run(tmp_path / "run", merged=merged)
    texts = {file.name: file.read_text() for file in folder.iterdir() if file.suffix in (".json", ".md")}
    assert not [name for name, text in texts.items() if str(cache_dir()) in text]
    if not merged:
        base = json.loads(texts["adapter_config.json"])["base_model_name_or_path"]
        assert base == "sentence-transformers/all-MiniLM-L6-v2"
        assert adapter_config("", folder).model.name == "asset:minilm-l6", "a further run needs no hub"


class Hub:
    """Takes the place of the hub's client."""

    endpoint = "https://hub.example"
    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    refuses = False

    def create_repo(self, repository: str, **options: Any) -> None:
        if self.refuses:
            raise PermissionError("401 not logged in")
        self.calls.append((repository, options))

    def upload_folder(self, **options: Any) -> None:
        self.calls.append((options["repo_id"], options))


def test_the_folder_is_uploaded_privately(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    folder = export_run(run)
    assert push_to_hub(folder, "clinic/reviews") == "https://hub.example/clinic/reviews"
    (created, options), (_, uploaded) = Hub.calls
    assert (created, options) == ("clinic/reviews", {"private": True, "exist_ok": True})
    assert uploaded["folder_path"] == str(folder)


@pytest.mark.parametrize(("base", "named"), [("owner/model", "owner/model"), ("FOLDER", None), ("/gone", None)])
def test_the_path_of_a_local_base_is_not_uploaded(
    base: str, named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"r": 8, "base_model_name_or_path": base.replace("FOLDER", str(tmp_path))}))
    push_to_hub(tmp_path, "clinic/reviews")
    assert json.loads(file.read_text()) == {"r": 8, "base_model_name_or_path": named}


def test_a_hub_that_refuses_is_told_in_a_line_and_the_folder_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "refuses", True)
    done = fedlora("export", run, "--push-to-hub", "clinic/reviews")
    assert done.code == 2
    assert "--push-to-hub = 'clinic/reviews': the hub does not take it (401 not logged in)" in " ".join(
        done.err.split()
    )
    assert (run / "export" / "adapter_config.json").is_file()
