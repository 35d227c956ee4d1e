"""A server cannot fill a node's disk: the cache is bounded, the oldest goes first, and room for the ledger is kept."""

from __future__ import annotations

import logging
import os
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord

from fedlora.clients import client_app
from fedlora.clients.client_app import app
from fedlora.clients.held import part_path
from fedlora.clients.participant import participant
from fedlora.communication.broadcast import HELD
from fedlora.communication.parts import INITIAL
from fedlora.communication.wire import digest, encode
from fedlora.deployment.processes import Child
from fedlora.errors import ClientErrorCode, InputError
from fedlora.node import resident, room, worker_process
from fedlora.node.config import NodeConfig, load_node
from fedlora.node.room import make_room, tidy
from tests.owner import Server, write_node


@pytest.fixture
def node(tmp_path: Path) -> NodeConfig:
    return load_node(write_node(tmp_path / "clinic", tmp_path / "cache", policy={"max_cache_gb": 1e-3}))


def leave(node: NodeConfig, name: str, size: int, age: float) -> Path:
    """Put a file, or a folder with one, into the cache; used so many seconds ago."""
    path = node.cache / name
    file = path if path.suffix else path / "train.tokens.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * size)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_longest_unused_go_first(node: NodeConfig) -> None:
    ages = {"tokens/old": 30, "initial/a.safetensors": 20, "tokens/new": 10}
    old, used, new = (leave(node, name, 300_000, age) for name, age in ages.items())
    asset = leave(node, "assets/minilm", 10**6, 1000)
    make_room(node, 100_000)
    assert old.exists()  # 1 MB is allowed
    make_room(node, 200_000)
    assert not old.exists()
    make_room(node, 0, (used,))
    make_room(node, 500_000, (used,))
    assert (used.exists(), new.exists(), asset.exists()) == (True, False, True)


def test_arrays_that_stay_on_the_node_are_bounded_too(node: NodeConfig) -> None:
    old, used = (node.directory / room.OWN / f"{name}.safetensors" for name in "ab")
    for path in (old, used):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 300_000)
        os.utime(path, (time.time() - 30,) * 2)
    make_room(node, 600_000, (used,))
    assert (old.exists(), used.exists()) == (False, True)


def test_more_than_the_owner_gives_is_refused_before_anything_goes(node: NodeConfig) -> None:
    kept = leave(node, "tokens/kept", 1000, 30)
    with pytest.raises(InputError, match=r"policy\.max_cache_gb = 0\.001: a run asks to keep 0\.002 GB"):
        make_room(node, 2 * 10**6)
    assert kept.exists()


def test_room_for_the_ledger_is_kept(node: NodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave(node, "tokens/old", 1000, 30)
    usage = namedtuple("usage", "total used free")

    def free(folder: Path) -> Any:
        return usage(10**9, 0, room.RESERVE - 1 if path.exists() else 2 * room.RESERVE)

    monkeypatch.setattr(room.shutil, "disk_usage", free)
    make_room(node, 1000)
    assert not path.exists()
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: usage(10**9, 0, room.RESERVE))
    with pytest.raises(InputError, match=r"state\.cache = .*0\.2 GB are free there"):
        make_room(node, 1)


def test_what_was_left_half_made_goes_after_a_day(node: NodeConfig) -> None:
    gone, building = leave(node, "assets/.half", 10, 90_000), leave(node, "tokens/.half", 10, 60)
    tidy(node.cache)
    assert (gone.exists(), building.exists()) == (False, True)


# From the outside.


@pytest.fixture
def server(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    yield Server(tmp_path / "server", "ffa-lora")
    client_app.forget_data()


def test_arrays_that_are_not_the_models_are_not_kept(tmp_path: Path, cache: Path, server: Server) -> None:
    node_file = write_node(tmp_path / "clinic", cache)
    here = server.context(node_file)
    app(server.describe(), here)
    before = set(cache.glob("initial/*"))
    junk = {"x": torch.ones(10)}
    some = {next(iter(server.frozen)): torch.ones(3, 3)}
    for arrays, claimed in ((junk, digest(junk)), (some, digest(some)), (junk, "0" * 64)):
        message = server.train(1)
        message.content[INITIAL] = encode(arrays)
        message.content[HELD] = ConfigRecord({INITIAL: claimed})
        assert app(message, here).error.code == ClientErrorCode.FAILED
    # Nor are the model's own, of a run that nobody described.
    other = Server(tmp_path / "server", "ffa-lora", run=99, federation="f99", method__rank=3)
    assert app(other.train(1), other.context(node_file)).error.code == ClientErrorCode.STALE
    assert set(cache.glob("initial/*")) == before
    assert not app(server.train(1), here).has_error()
    assert len(set(cache.glob("initial/*")) - before) <= 1


def test_arrays_that_stay_on_the_node_are_kept_within_what_the_owner_allows(
    tmp_path: Path, cache: Path, server: Server
) -> None:
    here = server.context(write_node(tmp_path / "clinic", cache, policy={"max_cache_gb": 0.1}))
    app(server.describe(), here)
    client = participant(server.train(1), here)
    client.keep({"lora_A": torch.ones(3)})
    with pytest.raises(InputError, match=r"policy\.max_cache_gb = 0\.1: a run asks to keep 0\.12 GB"):
        client.keep({"lora_A": torch.ones(30 * 10**6)})
    assert torch.equal(client.own()["lora_A"], torch.ones(3))


@pytest.mark.parametrize("name", ["../../own", "/etc/passwd", "0" * 63, ""])
def test_a_server_names_no_file(name: str) -> None:
    with pytest.raises(ValueError, match="no SHA-256"):
        part_path(name)


# Logs.


def test_the_workers_log_is_turned_and_its_lines_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[int] = []
    monkeypatch.setattr(resident.os, "dup2", lambda descriptor, output: outputs.append(output))
    log = tmp_path / "worker.log"
    log.write_bytes(b"x")
    resident.turn_log(tmp_path)
    assert not outputs
    log.write_bytes(b"x" * (resident._LOG_BYTES + 1))
    resident.turn_log(tmp_path)
    assert outputs == [1, 2]
    assert log.stat().st_size == 0
    assert (tmp_path / "worker.log.1").stat().st_size > resident._LOG_BYTES
    record = logging.LogRecord("fedlora", logging.ERROR, "", 1, "%s", ("y" * 10**6,), None)
    assert len(worker_process._ShortLines("%(message)s").format(record)) < 30_000


def test_a_childs_log_is_turned_while_it_runs(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    child = Child("this", [], tmp_path, log, {"PYTHONPATH": "", "FLWR_HOME": ""})
    child.start()
    assert child.process is not None
    child.process.wait()
    with log.open("ab") as stream:
        stream.write(b"x" * 20_000_001)
        stream.flush()
        child.turn_log()
        stream.write(b"after")
    assert log.read_bytes() == b"after"
    assert child.output() == "after"
    assert (tmp_path / "child.log.1").stat().st_size > 20_000_000
