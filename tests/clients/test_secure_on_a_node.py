"""A real node and secure sums: its owner may require them, and it trains for no server that asks for a plain update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedlora.clients.client_app import app
from fedlora.communication.secure_sums import KEYS, SECURE, SECURE_BYTES
from fedlora.errors import ClientErrorCode
from fedlora.flower import set_run_id
from fedlora.node.local_node import LocalNode
from fedlora.node.names import NODE_RECORD
from tests.messages import FIRST_NODE
from tests.owner import Server, refused, write_node


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))


def ask_for_keys(server: Server, **about: Any) -> Message:
    content = RecordDict({SECURE: ConfigRecord({"stage": KEYS, "client": 0, **about})})
    content[NODE_RECORD] = ConfigRecord({"federation": server.federation, "client": 0})
    message = Message(content, FIRST_NODE, f"query.{SECURE}", group_id="1")
    set_run_id(message, server.run)
    return message


def test_an_owner_may_require_secure_sums(tmp_path: Path, cache: Path) -> None:
    node_file = write_node(tmp_path / "clinic", cache, policy={"require_secure_aggregation": True})
    plain, secure = (Server(tmp_path / f"{on}", server__secure_aggregation=on) for on in (False, True))
    reason = refused(app(plain.describe(), plain.context(node_file)), ClientErrorCode.POLICY)
    assert reason == "PolicyError: require_secure_aggregation = true"
    assert not app(secure.describe(), secure.context(node_file)).has_error()


def test_no_plain_update_leaves_a_node_of_a_run_with_secure_sums(tmp_path: Path, cache: Path) -> None:
    node_file, server = write_node(tmp_path / "clinic", cache), Server(tmp_path, server__secure_aggregation=True)
    here = server.context(node_file)
    refused(app(ask_for_keys(server), here), ClientErrorCode.STALE)  # the run was not described
    app(server.describe(), here)
    reply = app(ask_for_keys(server), here)
    assert set(reply.content) == {SECURE_BYTES}
    assert set(here.state) == {SECURE}
    # Neither a message that asks for a plain update, nor one before all shares were exchanged.
    plain, early = server.train(1), server.train(1)
    early.content[SECURE] = ConfigRecord({"clients": [], "share": 1.0, "asked": 1})
    for message in (plain, early):
        refused(app(message, here), ClientErrorCode.STALE)
    assert LocalNode.open(node_file).ledger.steps() == 0
