"""Real nodes that add noise to a secure sum: each owner's ledger counts it, before it leaves, or the node refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedlora.clients import client_app
from fedlora.clients.client_app import app
from fedlora.communication.secure_sums import SECURE
from fedlora.errors import ClientErrorCode, InputError, StaleError
from fedlora.flower import set_run_id
from fedlora.node.config import load_node
from fedlora.node.local_node import LocalNode
from fedlora.node.names import NODE_RECORD
from fedlora.node.node_ledger import NodeLedger
from fedlora.privacy.calibration import spent_epsilon
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.strategies.secure_sums import SecureSums, read_masked
from tests.messages import FIRST_NODE
from tests.owner import Server, refused, write_node

DISTRIBUTED: dict[str, Any] = {
    "privacy__mode": "client",
    "privacy__noise": "distributed",
    "privacy__target_epsilon": "",
    "privacy__noise_multiplier": 2.0,
    "server__secure_aggregation": True,
}
"""Overrides of a run."""
OWNERS: dict[str, Any] = {"allow_distributed_noise": True, "max_epsilon": 50.0}
GROUP = "1"


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    yield
    client_app.forget_data()


class Round:
    """One round of a run with secure sums on three nodes, in this process."""

    def __init__(self, folder: Path, cache: Path, **overrides: Any) -> None:
        self.server = Server(folder, **{**DISTRIBUTED, **overrides})
        self.files = [write_node(folder / str(number), cache, policy=OWNERS) for number in range(3)]
        self.contexts = [self.server.context(file) for file in self.files]
        for context in self.contexts:
            reply = app(self.server.describe(), context)
            assert not reply.has_error(), reply.error
        self.sums = SecureSums(self.server.config)
        self.sums.send = lambda messages: [self.ask(message) for message in messages]
        shapes = [array.shape for array in self.server.arrays.values()]
        self.size = sum(math.prod(shape) for shape in shapes)
        self.failed: list[tuple[int, int]] = []

    def ask(self, message: Message) -> Message:
        """Have a node answer a query."""
        client = message.metadata.dst_node_id - FIRST_NODE
        message.content[NODE_RECORD] = ConfigRecord({"federation": self.server.federation, "client": client})
        set_run_id(message, self.server.run)
        return app(message, self.contexts[client])

    def exchange_keys(self) -> None:
        """Let the nodes exchange keys and shares."""
        nodes = {client: FIRST_NODE + client for client in range(3)}
        left = self.sums.share_keys(
            dict.fromkeys(nodes, 1.0),
            nodes,
            GROUP,
            self.size,
            lambda client, code, _: self.failed.append((client, code)),
        )
        assert left == [0, 1, 2], (self.failed, self.sums.failure)

    def train(self, client: int, **about: Any) -> Message:
        """Have a node train, by steps so small that its update is zeros."""
        message = self.server.train(1, client=client)
        message.content["config"]["learning-rate"] = 1e-12  # type: ignore[index]
        for key, record in self.sums.content(client).items():
            message.content[key] = record
        message.content[SECURE].update(about)  # type: ignore[union-attr]
        return app(message, self.contexts[client])

    def ledger(self, client: int) -> NodeLedger:
        return LocalNode.open(self.files[client]).ledger


def test_the_sums_noise_is_the_plans_and_each_owner_counts_it_once(tmp_path: Path, cache: Path) -> None:
    nodes = Round(tmp_path, cache)
    nodes.exchange_keys()
    assert nodes.ledger(0).history() == []
    total = np.zeros(nodes.size, np.uint32)
    for client in (0, 2):  # the third drops out
        reply = nodes.train(client)
        assert not reply.has_error(), reply.error
        vector, metrics = read_masked(reply, nodes.size, mechanism_of(nodes.server.config))
        assert "loss" not in metrics
        total = total + vector.numpy().view(np.uint32)
    mean = nodes.sums.unmask(total, [0, 2])
    assert mean is not None, nodes.sums.failure
    # z C on the sum: two of three were promised (0.6 of them), and two answered.
    assert float(mean.std()) * 2 == pytest.approx(2.0, rel=4 / math.sqrt(2 * nodes.size))
    for client, count in ((0, 1), (1, 0), (2, 1)):
        ledger = nodes.ledger(client)
        assert ledger.history() == [(1.0, 1.0, 1)] * count
        # An example moves an update by up to two clipping norms: half the noise multiplier.
        assert ledger.epsilon() == spent_epsilon("rdp", 1e-3, ((1.0, 1.0, 1),) * count)
    # The same round again is refused, and costs nothing.
    refused(nodes.train(0), ClientErrorCode.STALE)
    assert nodes.ledger(0).steps() == 1


def test_what_the_ceiling_does_not_cover_is_refused_before_anything_is_charged(tmp_path: Path, cache: Path) -> None:
    nodes = Round(tmp_path, cache)
    nodes.exchange_keys()
    text = nodes.files[1].read_text()
    nodes.files[1].write_text(text.replace("max_epsilon = 50.0", "max_epsilon = 1.0"))
    assert refused(nodes.train(1), ClientErrorCode.BUDGET) == "BudgetError: epsilon left = 1"
    assert refused(app(nodes.server.describe(), nodes.contexts[1]), ClientErrorCode.BUDGET)
    assert nodes.ledger(1).steps() == 0


def test_a_node_that_counts_on_other_shares_insists_on_them(tmp_path: Path, cache: Path) -> None:
    nodes = Round(tmp_path, cache, server__reconstruction_threshold=1.0)
    nodes.exchange_keys()
    # Two share the noise, says the server, and by the config three do.
    refused(nodes.train(0, promised=2), ClientErrorCode.STALE)
    assert nodes.ledger(0).steps() == 0
    assert not nodes.train(0).has_error()
    asked = RecordDict({SECURE: ConfigRecord({"stage": "unmask", "active": [0, 1], "dropped": [2]})})
    early = Message(asked, FIRST_NODE, f"query.{SECURE}", group_id=GROUP)
    assert refused(nodes.ask(early), ClientErrorCode.STALE) == StaleError.__name__


@pytest.mark.parametrize(
    ("policy", "changed", "reason"),
    [
        ({"max_epsilon": 50.0}, {}, "PolicyError: allow_distributed_noise = false"),
        (OWNERS, {"privacy__noise": "central", "server__secure_aggregation": False}, "allow_non_private = false"),
        (OWNERS, {"privacy__noise_multiplier": 0.0}, "PolicyError: allow_non_private = false"),
        ({**OWNERS, "min_noise_multiplier": 1.5}, {}, "PolicyError: min_noise_multiplier = 1.5"),
        # Noise of the node's own needs no other node.
        ({"max_epsilon": 50.0}, {"privacy__noise": "local"}, ""),
        ({"max_epsilon": 50.0, "accountant": "prv"}, {"privacy__noise": "local"}, "allow_non_private = false"),
    ],
)
def test_what_no_ledger_can_count_is_refused(
    tmp_path: Path, cache: Path, policy: dict[str, Any], changed: dict[str, Any], reason: str
) -> None:
    node_file = write_node(tmp_path / "clinic", cache, policy=policy)
    server = Server(tmp_path, **{**DISTRIBUTED, **changed})
    reply = app(server.describe(), server.context(node_file))
    if reason:
        assert refused(reply, ClientErrorCode.POLICY).endswith(reason)
    else:
        assert not reply.has_error(), reply.error


def test_an_owner_of_persons_counts_them(tmp_path: Path, cache: Path) -> None:
    """Whoever is in the file moves the update by no more than that, whatever the unit."""
    rows = [{"note": f"a joy {number}", "verdict": "good", "who": str(number // 2)} for number in range(20)]
    node_file = write_node(tmp_path / "clinic", cache, rows, data={"unit": "who"}, policy=OWNERS)
    server = Server(tmp_path, **DISTRIBUTED)
    reply = app(server.describe(), server.context(node_file))
    assert not reply.has_error(), reply.error


def test_an_accountant_without_a_bound_is_refused_at_once(tmp_path: Path, cache: Path) -> None:
    node_file = write_node(tmp_path / "clinic", cache, policy={**OWNERS, "accountant": "prv"})
    with pytest.raises(InputError, match=r"policy\.accountant = 'prv': has no bound for noise that nodes add"):
        load_node(node_file)
