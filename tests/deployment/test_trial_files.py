"""The files of a trial: nodes have the examples that a simulation's clients have, and commands read each file."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import load_config
from fedlora.data.partition import partition_rows
from fedlora.data.sources import load_examples
from fedlora.deployment import trial_files
from fedlora.deployment.config import load_server
from fedlora.deployment.keys import check_secret
from fedlora.deployment.processes import free_ports
from fedlora.deployment.trial import run_trial
from fedlora.deployment.trial_files import COORDINATOR, write_trial
from fedlora.errors import InputError, RunError
from fedlora.node.config import load_node
from fedlora.node.local_node import LocalNode
from fedlora.node.policy import folder_digest
from tests.deployment.federation import left_of

pytestmark = pytest.mark.usefixtures("cached")

ROWS = range(24)
CHAT = [{"role": "user", "content": "one, two?"}, {"role": "assistant", "content": "three"}]
SOURCES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "sequence-classification": (
        {"text": "note", "label": "verdict"},
        [{"note": f'a tale, {row} "times"\nover', "verdict": ["bad", "good"][row % 2]} for row in ROWS],
    ),
    "multi-label-classification": (
        {},
        [{"text": f"tale {row}", "label": [["a"], ["a", "b"], [], ["c"]][row % 4]} for row in ROWS],
    ),
    "regression": (
        {"text_pair": "other"},
        [{"text": f"tale {row}", "other": f"story {row}", "label": row / 7} for row in ROWS],
    ),
    "token-classification": (
        {},
        [{"text": ["go", "to", f"Rome{row}"], "label": ["O", "O", "PLACE"]} for row in ROWS],
    ),
    "causal-lm": (
        {"prompt": "question", "answer": "reply"},
        [{"question": f"what is {row}?", "reply": f"it is {row}"} for row in ROWS],
    ),
    "chat": ({"messages": "turns"}, [{"turns": CHAT * (1 + row % 2)} for row in ROWS]),
}
"""By task: keys of ``[data]``, and rows of a source."""


def source(folder: Path, task: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Make a simulation's config of three clients, with its examples in a file."""
    keys, rows = SOURCES[task]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = {"name": "asset:minilm-l6", "task": "causal-lm" if task == "chat" else task}
    content: dict[str, Any] = {
        "run": {"rounds": 2},
        "model": model,
        "data": {"name": str(folder / "rows.jsonl"), "partition": {"clients": 3}, **keys},
        "method": {"name": "fedit"},
    }
    return {**content, **{name: {**content.get(name, {}), **values} for name, values in sections.items()}}


@pytest.mark.parametrize("task", SOURCES)
def test_nodes_have_the_examples_of_the_clients(tmp_path: Path, task: str) -> None:
    config = load_config(source(tmp_path, task))
    files = write_trial(config, tmp_path / "trial")
    assert list(files.examples) == ["node-1", "node-2", "node-3"]
    found = load_examples(config)
    assert found.train is not None
    assert found.test is not None
    run = load_config(files.coordinator / "run.toml")
    given = run.model_copy(update={"data": run.data.model_copy(update={"test": str(files.coordinator / "test.jsonl")})})
    there = load_examples(given)
    assert there.test is not None
    assert there.label_names == found.label_names

    def columns(table: Any) -> dict[str, list[Any]]:
        return {name: table[name][:] for name in table.column_names if name != "place"}

    assert columns(there.test) == columns(found.test)
    for name, rows in zip(files.examples, partition_rows(config, found.train, found.label_names), strict=True):
        node = LocalNode.open(files.folder / name / "node.toml")
        own = load_examples(node.own_config(run, found.label_names)).train
        assert own is not None
        assert columns(own) == columns(found.train.select(rows))
        assert len(rows) == files.examples[name]


def test_each_machine_has_its_own_files(tmp_path: Path) -> None:
    files = write_trial(load_config(source(tmp_path, "sequence-classification")), tmp_path / "trial")
    server = load_server(files.coordinator / "server.toml")
    assert (server.host, server.port) == ("127.0.0.1", files.ports[0])
    assert len({*files.ports}) == 4
    for number, name in enumerate(files.examples, 1):
        node = load_node(files.folder / name / "node.toml")
        assert node.superlink.private_key == str(files.folder / name / "keys" / f"{name}.key")
        check_secret(Path(node.superlink.private_key), "private_key")
        assert Path(str(node.superlink.root_certificates)).read_bytes() == files.ca.read_bytes()
        assert node.superlink.port == files.ports[number]
        assert stat.S_IMODE(node.directory.stat().st_mode) == 0o700
        (model,) = (node.cache / "assets").iterdir()
        assert (model / "model.safetensors").is_file() or any(model.rglob("*.safetensors"))
    assert {path.name for path in files.folder.iterdir()} == {COORDINATOR, *files.examples}


def test_owners_keep_their_names(tmp_path: Path) -> None:
    content = source(tmp_path, "sequence-classification")
    rows = [
        {**row, "clinic": ["north", "south"][number % 2]}
        for number, row in enumerate(SOURCES["sequence-classification"][1])
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    content["data"]["partition"] = {"kind": "natural", "column": "clinic"}
    files = write_trial(load_config(content), tmp_path / "trial")
    assert list(files.examples) == ["north", "south"]


CLIENT = {"mode": "client", "target_delta": 1e-2, "target_epsilon": 8.0}
SECURE = {"secure_aggregation": True}


@pytest.mark.parametrize(
    ("privacy", "server", "ceiling"),
    [
        ({}, {}, None),
        ({}, SECURE, None),
        ({"mode": "example", "target_epsilon": 4.0, "target_delta": 1e-2}, {}, 8.0),
        ({"mode": "example", "noise_multiplier": 2.0, "target_delta": 1e-2}, {}, 1000.0),
        (CLIENT, {}, None),
        ({**CLIENT, "noise": "local"}, SECURE, 1000.0),
        ({**CLIENT, "noise": "distributed"}, SECURE, 1000.0),
    ],
)
def test_owners_admit_the_run_and_no_weaker_one(
    tmp_path: Path, privacy: dict[str, Any], server: dict[str, Any], ceiling: float | None
) -> None:
    config = load_config(source(tmp_path, "regression", privacy=privacy, server=server))
    files = write_trial(config, tmp_path / "trial")
    node, run = LocalNode.open(files.folder / "node-1" / "node.toml"), load_config(files.coordinator / "run.toml")
    assert node.config.policy.max_epsilon == ceiling
    node.admit(node.own_config(run, None), files.examples["node-1"])


def test_a_folder_of_a_model_is_listed_by_its_digest(tmp_path: Path) -> None:
    model = tmp_path / "own-bert"
    model.mkdir()
    (model / "config.json").write_text("{}")
    files = write_trial(load_config(source(tmp_path, "regression", model={"name": str(model)})), tmp_path / "trial")
    (entry,) = load_node(files.folder / "node-1" / "node.toml").policy.models
    assert (entry.name, entry.sha256) == (str(model), folder_digest(model))
    assert load_config(files.coordinator / "run.toml").model.name == entry.name


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"name": "nodes", "test": "rows.jsonl"}}, r"data\.name = 'nodes': is for existing nodes"),
        ({"model": {"name": "bert-base-uncased"}}, r"model\.name = .*is not loaded by nodes without a commit"),
        (
            {"data": {"long_texts": "split"}, "model": {"task": "causal-lm"}},
            r"data\.long_texts = 'split': is not done by",
        ),
    ],
)
def test_what_nodes_cannot_do_is_said_before_anything_is_written(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    config = load_config(source(tmp_path, "sequence-classification", **sections))
    with pytest.raises(InputError, match=message):
        write_trial(config, tmp_path / "trial")
    assert not (tmp_path / "trial").exists()


def test_a_folder_is_not_written_over(tmp_path: Path) -> None:
    config = load_config(source(tmp_path, "regression"))
    (tmp_path / "trial").mkdir()
    with pytest.raises(InputError, match=r"--folder = .*exists already"):
        write_trial(config, tmp_path / "trial")


def test_a_server_that_does_not_start_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setattr(trial_files, "free_ports", lambda count: [taken, *free_ports(count - 1)])
        with pytest.raises(RunError, match=r"the server: a process ended; .*server\.log ends with: fedlora: port = "):
            run_trial(load_config(source(tmp_path, "regression")), tmp_path / "trial", lines.append)
    assert "2. The coordinator starts the server" in "".join(lines)
    assert left_of(tmp_path / "trial") == []
