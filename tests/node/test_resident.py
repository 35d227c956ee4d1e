"""The resident worker as a process of its own: loaded once, private, replaced after a crash, gone when idle."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.node_app import app
from fedlora.errors import ClientErrorCode, InputError
from fedlora.node.config import load_node
from fedlora.node.names import NODE_FILE
from fedlora.node.resident import ask, stop_worker, worker_folder
from tests.messages import FIRST_NODE
from tests.owner import RUN, Server, write_node

LIGHT = "tests.node.light_app:app"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the worker's process import this package's app, which nobody installs."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture
def node_file(tmp_path: Path, cache: Path) -> Iterator[Path]:
    path = write_node(tmp_path / "clinic", cache)
    yield path
    worker_folder_of(path).chmod(0o700)
    stop_worker(load_node(path))


def worker_folder_of(node_file: Path) -> Path:
    folder = node_file.parent / "state" / "worker"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def pid(node_file: Path) -> int:
    return int((worker_folder_of(node_file) / "worker.pid").read_text())


def log_of(node_file: Path) -> str:
    return (worker_folder_of(node_file) / "worker.log").read_text()


def steps(node_file: Path) -> int:
    with sqlite3.connect(node_file.parent / "state" / "ledger.sqlite") as database:
        return int(database.execute("SELECT COALESCE(SUM(steps), 0) FROM charges").fetchone()[0])


def wait_until(condition: Callable[[], bool], seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def query(action: str = "", text: str = "") -> Message:
    content = RecordDict({"say": ConfigRecord({"text": text})})
    return Message(content, FIRST_NODE, f"query.{action}" if action else "query")


def context(node_file: Path) -> Context:
    return Context(run_id=RUN, node_id=1, node_config={NODE_FILE: str(node_file)}, state=RecordDict(), run_config={})


def test_one_worker_serves_all_messages_and_its_files_are_private(node_file: Path) -> None:
    here = context(node_file)
    replies = [ask(str(node_file), LIGHT, query(), here).content["metrics"] for _ in range(3)]
    assert [reply["calls"] for reply in replies] == [1, 2, 3]  # the context's state comes back
    assert {reply["worker"] for reply in replies} == {pid(node_file)}
    folder = worker_folder_of(node_file)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.iterdir()]}
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}
    assert stat.S_ISSOCK((folder / "worker.sock").stat().st_mode)
    # Its own session: what ends Flower's processes does not end it.
    assert os.getsid(pid(node_file)) == pid(node_file)


def test_clients_that_come_at_once_share_one_worker(node_file: Path) -> None:
    workers: list[object] = []

    def client() -> None:
        reply = ask(str(node_file), LIGHT, query(), context(node_file))
        workers.append(reply.content["metrics"]["worker"])

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert workers == [pid(node_file)] * 4


def test_a_message_that_kills_the_worker_is_tried_once_more(node_file: Path, tmp_path: Path) -> None:
    reply = ask(str(node_file), LIGHT, query("die", str(tmp_path / "died")), context(node_file))
    assert reply.content["metrics"]["calls"] == 1
    reply = ask(str(node_file), LIGHT, query("die"), context(node_file))
    assert (reply.error.code, reply.error.reason) == (ClientErrorCode.WORKER_DIED, "WorkerDiedError")


def test_an_error_leaves_its_text_in_the_nodes_log(node_file: Path) -> None:
    reply = ask(str(node_file), LIGHT, query("fail", "the secret diagnosis"), context(node_file))
    assert (reply.error.code, reply.error.reason) == (ClientErrorCode.FAILED, "Error")
    assert "the secret diagnosis" in log_of(node_file)
    assert stop_worker(load_node(node_file))
    # An app that is not there is an error of the same kind.
    reply = ask(str(node_file), "tests.secret_module:app", query(), context(node_file))
    assert (reply.error.code, reply.error.reason) == (ClientErrorCode.FAILED, "Error")
    assert "secret_module" in log_of(node_file)


def test_an_idle_worker_ends_and_the_next_message_starts_one(tmp_path: Path, cache: Path) -> None:
    node_file = write_node(tmp_path / "clinic", cache, worker={"idle_seconds": 0.3})
    first = ask(str(node_file), LIGHT, query(), context(node_file)).content["metrics"]["worker"]
    assert isinstance(first, int)
    wait_until(lambda: not is_alive(first))
    assert not (worker_folder_of(node_file) / "worker.sock").exists()
    assert not stop_worker(load_node(node_file))
    assert ask(str(node_file), LIGHT, query(), context(node_file)).content["metrics"]["worker"] != first
    stop_worker(load_node(node_file))


def test_a_worker_that_cannot_start_is_an_error_without_text(node_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.node.resident.sys.executable", "/bin/false")
    reply = ask(str(node_file), LIGHT, query(), context(node_file))
    assert (reply.error.code, reply.error.reason) == (ClientErrorCode.WORKER_DIED, "WorkerDiedError")


def test_a_folder_that_others_can_enter_is_refused(node_file: Path) -> None:
    worker_folder_of(node_file).chmod(0o750)
    with pytest.raises(InputError, match=r"state\.directory = .*chmod 700"):
        worker_folder(load_node(node_file))
    reply = ask(str(node_file), LIGHT, query(), context(node_file))
    assert (reply.error.code, reply.error.reason) == (ClientErrorCode.INPUT, "InputError")


def test_a_node_file_that_is_gone_is_an_error_without_text(tmp_path: Path) -> None:
    reply = ask(str(tmp_path / "secret" / "node.toml"), LIGHT, query(), context(tmp_path))
    assert (reply.error.code, reply.error.reason) == (ClientErrorCode.INPUT, "InputError")


def test_a_worker_killed_in_a_round_has_charged_the_steps_that_it_began(
    node_file: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    server = Server(tmp_path / "server", client__local_steps=200, privacy__target_epsilon=7.0)
    here = server.context(node_file)
    assert app(server.describe(), here).content["metrics"]["num-examples"] == 60
    first = pid(node_file)

    def kill() -> None:
        wait_until(lambda: steps(node_file) >= 3)
        os.kill(first, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    reply = app(server.train(1), here)
    killer.join()
    assert (reply.error.code, reply.error.reason) == (ClientErrorCode.WORKER_DIED, "WorkerDiedError")
    charged = steps(node_file)
    assert 3 <= charged < 200
    # The round that was lost stays lost, and the next goes on, in the new worker.
    assert app(server.train(1), here).error.code == ClientErrorCode.STALE
    assert steps(node_file) == charged
    reply = app(server.train(2), here)
    assert reply.content["metrics"]["total-steps"] == charged + 200
    assert reply.content["metrics"]["worker"] == pid(node_file) != first
    assert steps(node_file) == charged + 200
