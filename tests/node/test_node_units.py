"""A node whose owner protects persons: what it admits, by what it counts, and what it has spent."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedlora.clients import client_app
from fedlora.clients.client_app import app
from fedlora.errors import ClientErrorCode, InputError
from fedlora.node.config import PolicySection, load_node
from fedlora.node.local_node import LocalNode
from fedlora.node.node_ledger import _SEALED_BEFORE_UNITS, NodeLedger, _seal, _sealing
from fedlora.node.status import node_status
from fedlora.privacy.calibration import spent_epsilon
from tests import tiny
from tests.command import fedlora
from tests.owner import Server, refused, reviews, write_node

PATIENTS = [0] * 30 + [number // 3 for number in range(3, 33)]
"""Of 60 rows: one has 30, ten others three each."""


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    yield
    client_app.forget_data()


def rows() -> list[dict[str, str]]:
    return [{**row, "patient": str(patient)} for row, patient in zip(reviews(), PATIENTS, strict=True)]


def node(folder: Path, cache: Path, unit: str | None = "patient", **data: Any) -> Path:
    content = {"path": "notes.csv", "text": "note", "label": "verdict", **data, **({"unit": unit} if unit else {})}
    return write_node(folder, cache, rows(), data=content, policy={"max_epsilon": 50.0, "delta": 1e-3})


def metrics(reply: Message) -> dict[str, Any]:
    assert not reply.has_error(), reply.error
    return dict(reply.content["metrics"])  # type: ignore[call-overload]


def test_it_counts_by_its_own_column_and_its_own_persons(tmp_path: Path, cache: Path) -> None:
    """The server names another column: it only says that persons are protected."""
    server = Server(tmp_path / "server", client__batch_size=2, privacy__unit="author")
    file = node(tmp_path / "clinic", cache)
    here = server.context(file)
    assert metrics(app(server.describe(), here)) == {"num-examples": 11}
    told = metrics(app(server.train(1), here))
    assert told["num-examples"] == 11
    assert told["sample-rate"] == pytest.approx(2 / 11)
    ledger = LocalNode.open(file).ledger
    assert ledger.history() == [(told["noise-multiplier"], told["sample-rate"], 3)]
    assert told["epsilon"] == pytest.approx(spent_epsilon("rdp", 1e-3, tuple(ledger.history())))


def test_it_counts_the_examples_of_a_person_that_a_step_may_hold(tmp_path: Path, cache: Path) -> None:
    way = {"privacy__unit": "author", "privacy__user_mechanism": "els", "privacy__examples_per_unit": 2}
    server = Server(tmp_path / "server", client__batch_size=4, **way)
    file = node(tmp_path / "clinic", cache)
    here = server.context(file)
    assert metrics(app(server.describe(), here)) == {"num-examples": 22}
    told = metrics(app(server.train(1), here))
    history = LocalNode.open(file).ledger.history()
    assert history == [(told["noise-multiplier"], 4 / 22, 3, 2)]
    assert told["epsilon"] == pytest.approx(spent_epsilon("rdp", 1e-3, tuple(history)))
    assert told["epsilon"] > spent_epsilon("rdp", 1e-3, (history[0][:3],))


def test_persons_that_it_tests_on_are_not_counted(tmp_path: Path, cache: Path) -> None:
    server = Server(tmp_path / "server", client__batch_size=2, privacy__unit="author")
    here = server.context(node(tmp_path / "clinic", cache, test=0.1))
    told = metrics(app(server.describe(), here))
    assert 1 <= told["num-examples"] < 11
    assert metrics(app(server.train(1), here))["num-examples"] == told["num-examples"]


@pytest.mark.parametrize(("unit", "asked"), [("patient", None), (None, "author")])
def test_runs_protect_what_the_owner_protects(tmp_path: Path, cache: Path, unit: str | None, asked: str | None) -> None:
    given = {"privacy__unit": asked} if asked else {}
    server = Server(tmp_path / "server", **given)
    reply = app(server.describe(), server.context(node(tmp_path / "clinic", cache, unit)))
    assert refused(reply, ClientErrorCode.POLICY) == f"PolicyError: unit = {'true' if unit else 'false'}"


def test_a_node_without_such_a_column_says_no_more_than_that(tmp_path: Path, cache: Path) -> None:
    server = Server(tmp_path / "server", privacy__unit="author")
    reply = app(server.describe(), server.context(node(tmp_path / "clinic", cache, "person")))
    assert refused(reply, ClientErrorCode.INPUT) == "InputError"


def test_steps_that_protect_different_units_are_not_added_up(tmp_path: Path) -> None:
    policy = PolicySection(max_epsilon=8.0, delta=1e-3)
    ledger = NodeLedger(tmp_path, policy)
    ledger.register("f", "1", None)
    with ledger.round("f", "1", 1, tiny.plan(sigma=5.0, rate=0.1), 1) as charge:
        charge.step()
    by_person = NodeLedger(tmp_path, policy, "patient")
    with (
        pytest.raises(InputError, match="single examples") as caught,
        by_person.round("f", "1", 2, tiny.plan(sigma=5.0, rate=0.1), 1),
    ):
        pass
    assert caught.value.field == "data.unit"
    NodeLedger(tmp_path, policy).check_budget("f", tiny.plan(sigma=5.0, rate=0.1), 1)


def test_a_ledger_from_before_units_goes_on(tmp_path: Path) -> None:
    policy = PolicySection(max_epsilon=8.0, delta=1e-3)
    ledger = NodeLedger(tmp_path, policy)
    ledger.register("f", "1", None)
    with ledger.round("f", "1", 1, tiny.plan(sigma=5.0, rate=0.1), 2) as charge:
        charge.step()
    with sqlite3.connect(ledger.path) as database:
        for column in ("group_size", "unit"):
            database.execute(f"ALTER TABLE charges DROP COLUMN {column}")
        _seal(database, "charges", _sealing(database, "charges", sealed=_SEALED_BEFORE_UNITS))
    database.close()
    again = NodeLedger(tmp_path, policy)
    assert again.history() == [(5.0, 0.1, 1)]
    with again.round("f", "1", 2, tiny.plan(sigma=5.0, rate=0.1), 1) as charge:
        charge.step()
    assert NodeLedger(tmp_path, policy).history() == [(5.0, 0.1, 2)]
    with sqlite3.connect(ledger.path) as database:
        database.execute("UPDATE charges SET unit = 'patient'")
    database.close()
    with pytest.raises(InputError, match="rows are missing or changed"):
        NodeLedger(tmp_path, policy)


def test_an_owner_sees_the_runs_and_what_is_spent_and_left(tmp_path: Path, cache: Path) -> None:
    file = write_node(tmp_path, cache, policy={"max_epsilon": 4.0, "delta": 1e-3})
    with pytest.raises(InputError, match="holds no ledger"):
        node_status(load_node(file))
    ledger = LocalNode.open(file).ledger
    for run, federation, steps in (("1", "first", 3), ("2", "second", 0), ("3", "first", 2), ("4", "third", 6)):
        ledger.register(federation, run, None, name=f"{federation}-run")
        if steps:
            with ledger.round(federation, run, 1, tiny.plan(sigma=5.0, rate=0.1), steps) as charge:
                for _ in range(steps):
                    charge.step()
    found = node_status(load_node(file))
    served = [(one.federation, one.name, one.rounds, one.steps) for one in found.runs]
    assert served == [
        ("first", "first-run", 1, 5), ("second", "second-run", 0, 0), ("third", "third-run", 1, 6),
    ]  # fmt: skip
    exact, third, first = (spent_epsilon("rdp", 1e-3, ((5.0, 0.1, steps),)) for steps in (11, 6, 5))
    assert [one.epsilon for one in found.runs] == pytest.approx([first, 0.0, third])
    # Epsilons do not add up: all steps together have one.
    assert [one.total for one in found.runs] == pytest.approx([first, first, exact])
    assert [one.left for one in found.runs] == pytest.approx([4.0 - first, 4.0 - first, 4.0 - exact])
    assert exact < first + third
    assert found.epsilon == pytest.approx(exact)
    assert found.left == pytest.approx(4.0 - exact)
    assert found.runs[1].begun_at is None
    done = fedlora("node", "status", file, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == json.loads(json.dumps(found.to_dict()))
    shown = fedlora("node", "status", file).out
    assert f"left      {4.0 - exact:.6g} of 4\n" in shown
    assert "one example" in shown
    assert [line.split()[-3:] for line in shown.splitlines() if line.startswith(("first-run", "third-run"))] == [
        [f"{first:.4g}", f"{first:.4g}", f"{4.0 - first:.4g}"],
        [f"{third:.4g}", f"{exact:.4g}", f"{4.0 - exact:.4g}"],
    ]
    missing = fedlora("node", "status", tmp_path / "none.toml")
    assert missing.code == 2
    assert len(missing.err.strip().splitlines()) == 1
