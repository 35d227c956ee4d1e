"""The files of a trial federation: a folder for each machine that it could be, with keys, TOML files and examples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from fedlora.assets import fetch, is_asset
from fedlora.config import NODES, Config, load_config
from fedlora.deployment.keys import make_ca, make_node_key, make_server_certificate
from fedlora.deployment.processes import free_ports
from fedlora.errors import InputError
from fedlora.node.names import is_node_name
from fedlora.node.policy import folder_digest
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.results.folder import to_json
from fedlora.tasks import get_task

if TYPE_CHECKING:
    import datasets

NAME = "trial"
"""The server's name in Flower's config.toml, for ``--on``."""
COORDINATOR = "coordinator"
"""Folder of the server's machine."""

_ROOMY = 1000.0
"""Ceiling of an owner's epsilon where the run has no target."""
_PARTS = ("test", "validation", "public")


@dataclass(frozen=True)
class TrialFiles:
    """The folders of a trial.

    Attributes
    ----------
    folder : Path
    examples : dict of str to int
        Number of examples by node, in the order of the clients.
    tested : int
        Number of test examples on the server.
    ports : list of int
        The server's, and one for each node.
    """

    folder: Path
    examples: dict[str, int]
    tested: int
    ports: list[int]

    @property
    def coordinator(self) -> Path:
        """The server's folder."""
        return self.folder / COORDINATOR

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.coordinator / "keys" / "ca.crt"

    @property
    def address(self) -> str:
        """The server's address."""
        return f"127.0.0.1:{self.ports[0]}"


def write_trial(config: Config, folder: Path) -> TrialFiles:
    """Divide a config's examples among nodes, and write the files of a server and of each node.

    Parameters
    ----------
    config : Config
        Of a simulation; its clients become nodes.
    folder : Path
        Must not exist.

    Raises
    ------
    InputError
        If the folder exists, the examples cannot be divided, or no node would load the model.
    """
    from fedlora.data.partition import client_names, partition_rows
    from fedlora.data.sources import load_examples

    if os.path.lexists(folder):
        raise InputError("--folder", str(folder), "exists already; choose another, or remove it")
    if config.data.name == NODES:
        raise InputError("data.name", NODES, "is for existing nodes; name the examples to divide among new ones")
    models = _listed_models(config)
    found = load_examples(config)
    train = found.train
    assert train is not None
    parts = partition_rows(config, train, found.label_names)
    names = _node_names(client_names(config, train, parts))
    tables = {name: table for name in _PARTS if (table := getattr(found, name)) is not None}
    sizes = dict(zip(names, map(len, parts), strict=True))
    files = TrialFiles(folder, sizes, len(tables["test"]), free_ports(1 + len(names)))
    run = _run_of_nodes(config, found.label_names, tables)
    load_config(run)  # what nodes cannot do is said before anything is written
    make_ca(files.ca.parent)
    make_server_certificate(files.ca.parent, ["127.0.0.1"])
    for name, table in tables.items():
        _write_examples(files.coordinator / f"{name}.jsonl", table, config, found.label_names)
    _write(files.coordinator / "server.toml", _server(files))
    _write(files.coordinator / "run.toml", run)
    entry = {"address": files.address, "root-certificates": str(files.ca.absolute())}
    _write(files.coordinator / "flower" / "config.toml", {"superlink": {NAME: entry}})
    for name, rows in zip(names, parts, strict=True):
        own = folder / name
        make_node_key(own / "keys", name)
        (own / "keys" / "ca.crt").write_bytes(files.ca.read_bytes())
        _write_examples(own / "examples.jsonl", train.select(rows), config, found.label_names)
        _write(own / "node.toml", _node(files, name, config, train.column_names, models))
        _lend_asset(config.model.name, own / "state")
    return files


def _lend_asset(name: str, state: Path) -> None:
    """Link a model that lies in this machine's cache into a node's own, so that no node downloads it again."""
    state.mkdir(mode=0o700)
    if is_asset(name):
        asset = fetch(name, "model", "model.name")
        link = state / "cache" / "assets" / asset.name
        link.parent.mkdir(parents=True)
        link.symlink_to(asset.absolute())


def _node_names(clients: Sequence[str]) -> list[str]:
    """Return the owners' names where they can be nodes' and keep their order, else node-1, node-2 and so on."""
    fit = all(is_node_name(name) and name.lower() != COORDINATOR for name in clients)
    if fit and not clients[0].isdigit() and sorted({name.lower() for name in clients}) == [n.lower() for n in clients]:
        return list(clients)
    digits = len(str(len(clients)))
    return [f"node-{number:0{digits}}" for number in range(1, len(clients) + 1)]


def _listed_models(config: Config) -> list[dict[str, str]]:
    """Return the owners' list of models for a run.

    Raises
    ------
    InputError
        If the model is neither an asset, nor a folder, nor at a commit of the hub.
    """
    model = config.model
    if is_asset(model.name):
        return []
    if Path(model.name).is_dir():
        path = Path(model.name).absolute()
        return [{"name": str(path), "sha256": folder_digest(path)}]
    if model.revision is None:
        remedy = "is not loaded by nodes without a commit; set model.revision to its 40 digits, or name a folder"
        raise InputError("model.name", model.name, remedy)
    return [{"name": model.name, "revision": model.revision}]


def _run_of_nodes(
    config: Config, label_names: list[str] | None, tables: Mapping[str, datasets.Dataset]
) -> dict[str, Any]:
    """Return the run's config with nodes in place of the examples, and the server's files."""
    content = config.model_dump(exclude_unset=True, exclude_none=True)
    data: dict[str, Any] = {"name": NODES}
    # The server's working directory is its state.
    data |= {name: f"../{name}.jsonl" for name in tables}
    if label_names is not None:
        data["label_names"] = label_names
    columns = tables["test"].column_names
    data |= {key: key for key in ("text_pair", "prompt", "answer", "messages", "choices") if key in columns}
    data |= {key: value for key in ("packing", "long_texts") if (value := content["data"].get(key)) is not None}
    if Path(config.model.name).is_dir():
        content["model"]["name"] = str(Path(config.model.name).absolute())
    content["data"] = data
    content.pop("simulation", None)
    return content


def _server(files: TrialFiles) -> dict[str, Any]:
    tls = {"ca_certificate": "keys/ca.crt", "certificate": "keys/server.crt", "private_key": "keys/server.key"}
    return {"host": "127.0.0.1", "port": files.ports[0], "directory": "state", "tls": tls}


def _node(
    files: TrialFiles, name: str, config: Config, columns: Sequence[str], models: list[dict[str, str]]
) -> dict[str, Any]:
    data: dict[str, Any] = {"path": "examples.jsonl"}
    data |= {key: key for key in ("text_pair", "prompt", "answer", "messages", "unit") if key in columns}
    policy = _policy(config)
    if config.server.fraction_evaluate:
        data["test"] = config.data.client_test or 0.1
        policy["max_evaluations_per_day"] = 1000
    cores = len(os.sched_getaffinity(0))
    return {
        "name": name,
        "superlink": {
            "address": files.address,
            "root_certificates": "keys/ca.crt",
            "private_key": f"keys/{name}.key",
            "port": files.ports[1 + list(files.examples).index(name)],
        },
        "data": data,
        "policy": {**policy, **({"models": models} if models else {})},
        "worker": {"threads": max(1, cores // len(files.examples))},
        "state": {"directory": "state"},
    }


def _policy(config: Config) -> dict[str, Any]:
    """Return a policy that admits the run, and another like it."""
    privacy = config.privacy
    updates = mechanism_of(config).update_noise(config) is not None
    if not updates and privacy.mode != "example":
        return {"allow_non_private": True}
    policy: dict[str, Any] = {"max_epsilon": _ROOMY, "delta": min(privacy.target_delta, 1e-5 if updates else 1.0)}
    if privacy.target_epsilon is not None and not updates:
        policy["max_epsilon"] = 2 * privacy.target_epsilon
    if updates:
        policy |= {"require_secure_aggregation": True, "allow_distributed_noise": privacy.noise == "distributed"}
    return policy


def _write_examples(path: Path, table: datasets.Dataset, config: Config, label_names: list[str] | None) -> None:
    """Write examples as JSON lines, with labels as the owner would write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    task = get_task(config.model.task)
    named = task.classes and label_names is not None
    left_out = {"place", "partition"}
    with path.open("w", encoding="utf-8") as stream:
        for row in table:
            kept = {key: value for key, value in row.items() if key not in left_out}
            if named and "label" in kept:
                kept["label"] = task.named(kept["label"], label_names or [])
            stream.write(to_json(kept) + "\n")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(content), encoding="utf-8")
