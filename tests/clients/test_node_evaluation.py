"""A real node evaluates on test examples of its owner's, if the owner says so; sums and their number leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MessageType, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlora.clients.client_app import app
from fedlora.clients.resources import client_data, client_model, forget_data
from fedlora.communication.wire import decode
from fedlora.config import Config
from fedlora.errors import ClientErrorCode, InputError
from fedlora.flower import set_run_id
from fedlora.node.config import load_node
from fedlora.node.local_node import LocalNode
from fedlora.strategies.evaluation import read_sums
from fedlora.training.evaluation import statistics
from tests.messages import FIRST_NODE
from tests.owner import LABELS, Server, refused, reviews, write_csv, write_node

ASKS: dict[str, Any] = {"server__fraction_evaluate": 1.0, "server__evaluate_not_covered": True}
ALLOWED = {"max_epsilon": 8.0, "delta": 1e-3, "max_evaluations_per_day": 5}


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    yield
    forget_data()


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "server", **ASKS)


def evaluation(server: Server, server_round: int = 1) -> Message:
    """Make the message of a round's evaluation out of one for training."""
    train = server.train(server_round)
    message = Message(RecordDict(dict(train.content)), FIRST_NODE, MessageType.EVALUATE, group_id=str(server_round))
    set_run_id(message, server.run)
    return message


def metrics_of(reply: Message) -> dict[str, Any]:
    assert not reply.has_error(), reply.error
    assert set(reply.content) == {"metrics"}
    return dict(reply.content["metrics"])


def expected(config: Config, server: Server) -> dict[str, np.ndarray]:
    """Sum over what the node tests on, with the model that the message brings."""
    adapted = client_model(config)
    adapted.set_shared(decode(server.frozen) | decode(server.arrays))
    table, rows = client_data(config).own_test(0)
    return {name: values.sum(0) for name, values in statistics(adapted, table, rows, 5).items()}


def test_nothing_is_evaluated_unless_the_owner_says_so(tmp_path: Path, cache: Path, server: Server) -> None:
    node_file = write_node(tmp_path / "clinic", cache, data={"test": 0.25})
    here = server.context(node_file)
    app(server.describe(), here)
    reason = refused(app(evaluation(server), here), ClientErrorCode.POLICY)
    assert reason == "PolicyError: max_evaluations_per_day = 0"


@pytest.mark.parametrize("test", [0.25, "tests.csv"])
def test_sums_over_the_owners_test_examples_leave(
    tmp_path: Path, cache: Path, server: Server, test: float | str
) -> None:
    (tmp_path / "clinic").mkdir()
    write_csv(tmp_path / "clinic" / "tests.csv", reviews(14, 5))
    node_file = write_node(tmp_path / "clinic", cache, data={"test": test}, policy=ALLOWED)
    here = server.context(node_file)
    described = dict(app(server.describe(), here).content["metrics"])
    own = LocalNode.open(node_file).own_config(server.config, LABELS)
    train, (_, rows) = client_data(own).partition[0], client_data(own).own_test(0)
    # A share is taken out of the training examples; a file is beside them.
    assert described == {"num-examples": len(train)}
    assert (len(train), len(rows)) == ((45, 15) if test == 0.25 else (60, 14))
    reply = app(evaluation(server), here)
    sums = expected(own, server)
    shapes = {name: value.shape for name, value in sums.items()}
    examples, found = read_sums(reply, shapes)
    assert examples == len(rows)
    for name, value in sums.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
    # Training goes on as if nothing had been, and is charged alone.
    assert metrics_of_training(app(server.train(1), here))["num-examples"] == len(train)
    assert LocalNode.open(node_file).ledger.steps() == 3
    assert not app(evaluation(server), here).has_error()


def metrics_of_training(reply: Message) -> dict[str, Any]:
    assert not reply.has_error(), reply.error
    return dict(reply.content["metrics"])


def test_servers_evaluate_no_more_often_than_the_owner_allows(tmp_path: Path, cache: Path, server: Server) -> None:
    policy = {**ALLOWED, "max_evaluations_per_day": 2}
    node_file = write_node(tmp_path / "clinic", cache, data={"test": 0.25}, policy=policy)
    here = server.context(node_file)
    app(server.describe(), here)
    for server_round in (1, 2):
        assert not app(evaluation(server, server_round), here).has_error()
    reason = refused(app(evaluation(server, 3), here), ClientErrorCode.POLICY)
    assert reason == "PolicyError: max_evaluations_per_day = 2"
    other = Server(tmp_path / "other", run=77, federation="f2", **ASKS)
    app(other.describe(), other.context(node_file))
    refused(app(evaluation(other), other.context(node_file)), ClientErrorCode.POLICY)


def test_a_sum_over_few_examples_does_not_leave(tmp_path: Path, cache: Path, server: Server) -> None:
    node_file = write_node(tmp_path / "clinic", cache, data={"test": 0.1}, policy=ALLOWED)
    here = server.context(node_file)
    app(server.describe(), here)
    reason = refused(app(evaluation(server), here), ClientErrorCode.POLICY)
    assert reason == "PolicyError: min_test_examples = 10"


def test_a_run_that_did_not_say_so_evaluates_nothing(tmp_path: Path, cache: Path) -> None:
    server = Server(tmp_path / "server")
    node_file = write_node(tmp_path / "clinic", cache, data={"test": 0.25}, policy=ALLOWED)
    here = server.context(node_file)
    refused(app(evaluation(server), here), ClientErrorCode.STALE)  # nor one that was never described
    app(server.describe(), here)
    refused(app(evaluation(server), here), ClientErrorCode.STALE)
    asks = Server(tmp_path / "server", **ASKS)
    refused(app(evaluation(asks), asks.context(node_file)), ClientErrorCode.STALE)  # another config than described


def test_a_test_file_with_other_labels_is_refused_at_once(tmp_path: Path, cache: Path, server: Server) -> None:
    (tmp_path / "clinic").mkdir()
    write_csv(tmp_path / "clinic" / "tests.csv", [{"note": "a tale", "verdict": "secret"}] * 12)
    node_file = write_node(tmp_path / "clinic", cache, data={"test": "tests.csv"}, policy=ALLOWED)
    assert refused(app(server.describe(), server.context(node_file)), ClientErrorCode.LABELS) == "LabelError"


@pytest.mark.parametrize(
    ("data", "policy", "message"),
    [
        ({}, ALLOWED, "policy.max_evaluations_per_day = 5: needs data.test"),
        ({"test": "none.csv"}, ALLOWED, "there is no such file"),
        ({"test": 1.0}, ALLOWED, "data.test"),
        ({"test": "node.toml"}, ALLOWED, "another format"),
    ],
)
def test_an_owners_mistakes_are_named(data: Any, policy: Any, message: str, tmp_path: Path, cache: Path) -> None:
    path = write_node(tmp_path / "clinic", cache, data=data, policy=policy)
    with pytest.raises(InputError, match=message):
        load_node(path)


_shared: list[Server] = []


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12), min_size=12))
def test_no_text_and_no_examples_own_value_is_in_an_answer(texts: list[str]) -> None:
    """Whatever the owner's texts are, the answer is the declared numbers: a count, and a sum a statistic."""
    from tempfile import TemporaryDirectory, mkdtemp

    from fedlora.assets import cache_dir

    if not _shared:
        _shared.append(Server(Path(mkdtemp()), **ASKS))
    server = _shared[0]
    with TemporaryDirectory() as folder:
        rows = [{"note": f"secret {text}", "verdict": LABELS[n % 2]} for n, text in enumerate(texts)]
        write_csv(Path(folder) / "tests.csv", rows)
        clinic = Path(folder) / "clinic"
        data = {"test": str(Path(folder) / "tests.csv")}
        node_file = write_node(clinic, cache_dir(), data=data, policy=ALLOWED)
        here = server.context(node_file)
        app(server.describe(), here)
        metrics = metrics_of(app(evaluation(server), here))
    assert metrics.pop("num-examples") == len(rows)
    sizes = {name: len(value) if isinstance(value, list) else 0 for name, value in metrics.items()}
    assert sizes == {"count": 0, "loss": 0, "hits": 2, "predictions": 2, "labels": 2}
    assert metrics["count"] == len(rows)
    numbers = [n for value in metrics.values() for n in (value if isinstance(value, list) else [value])]
    assert all(isinstance(number, float) for number in numbers)
