"""The client half on a real node: its own file, its owner's policy and ledger, and errors that keep the data in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapters.parameterisations.sb import sketch_basis
from fedlora.arrays import Arrays
from fedlora.clients import client_app, half
from fedlora.clients.client_app import app
from fedlora.clients.participant import sent_digest
from fedlora.communication.wire import decode, encode
from fedlora.data.tokens import TokenTable
from fedlora.errors import (
    BudgetError,
    ClientErrorCode,
    GuardError,
    InputError,
    LabelError,
    PolicyError,
    StaleError,
    error_code,
)
from fedlora.experts import Mixture
from fedlora.methods import get_method
from fedlora.models import load_base
from fedlora.node.local_node import LocalNode
from fedlora.node.names import NODE_RECORD, labels_digest
from fedlora.node.node_ledger import Charge
from fedlora.node.outward_errors import is_outward, outward_error
from fedlora.privacy import plan_privacy
from fedlora.privacy.calibration import spent_epsilon
from fedlora.roles import Exchange
from tests import architectures, tiny
from tests.messages import train_message
from tests.owner import LABELS, Server, listed, refused, reviews, write_csv, write_node

ERRORS = [ValueError, KeyError, RuntimeError, InputError, LabelError, BudgetError, GuardError, StaleError, OSError]


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    yield
    client_app.forget_data()


@pytest.fixture
def node_file(tmp_path: Path, cache: Path) -> Path:
    return write_node(tmp_path / "clinic", cache)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "server")


def steps(node_file: Path) -> int:
    return LocalNode.open(node_file).ledger.steps()


def arrays_of(reply: Message) -> Arrays:
    assert not reply.has_error(), reply.error
    record: Any = reply.content["arrays"]
    return decode(record)


def metrics_of(reply: Message) -> dict[str, Any]:
    assert not reply.has_error(), reply.error
    return dict(reply.content["metrics"])  # type: ignore[call-overload]


# What leaves a node.


def test_a_node_describes_itself_by_name_and_counts(node_file: Path, server: Server) -> None:
    reply = app(server.describe(), server.context(node_file))
    assert metrics_of(reply) == {"num-examples": 60}
    assert dict(reply.content[NODE_RECORD]) == {"name": "clinic", "labels": labels_digest(LABELS)}
    assert set(reply.content) == {"metrics", NODE_RECORD}
    assert steps(node_file) == 0


def test_a_node_whose_budget_covers_a_part_of_a_round_says_so_before_the_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two exchanges a round, both have to fit."""
    exchanges = classmethod(lambda cls, config, server_round: (Exchange(cls.roles(config, server_round)),) * 2)
    monkeypatch.setattr(get_method("ffa-lora"), "exchanges", exchanges)
    server = Server(tmp_path / "server", "ffa-lora")
    plan = plan_privacy(server.config, 60)
    policy = LocalNode.open(write_node(tmp_path / "clinic", cache)).config.policy
    one, both = (
        spent_epsilon(policy.accountant, policy.delta, ((plan.noise_multiplier, plan.sample_rate, 3 * count),))
        for count in (1, 2)
    )
    for ceiling, fits in ((both * 1.01, True), ((one + both) / 2, False)):
        node_file = write_node(tmp_path / f"up-to-{fits}", cache, policy={"max_epsilon": ceiling})
        reply = app(server.describe(), server.context(node_file))
        if fits:
            assert metrics_of(reply) == {"num-examples": 60}
        else:
            refused(reply, ClientErrorCode.BUDGET)


@pytest.mark.parametrize("method", ["fed-sb", "ffa-lora", "fedit"])
def test_a_node_trains_on_its_own_file_and_charges_every_step(tmp_path: Path, node_file: Path, method: str) -> None:
    server = Server(tmp_path / "server", method)
    here = server.context(node_file)
    app(server.describe(), here)
    reply = app(server.train(1), here)
    assert set(arrays_of(reply)) == set(server.arrays)
    assert set(reply.content) == {"arrays", "metrics"}
    metrics = metrics_of(reply)
    assert (metrics["num-examples"], metrics["steps"], metrics["sample-rate"]) == (60, 3, 12 / 60)
    assert "loss" not in metrics
    assert steps(node_file) == 3
    # The frozen arrays are kept: the second message comes without them.
    assert metrics_of(app(server.train(2, initial=False), here))["total-steps"] == 6
    assert steps(node_file) == 6


def expert_server(tmp_path: Path) -> Server:
    """Make a server of a FlexMoRE run, whose first message carries no arrays."""
    sections = {"model__name": str(tiny.save_llama(tmp_path / "model")), "model__task": "causal-lm"}
    sections["known"] = tiny.KNOWN
    return Server(tmp_path / "server", "flexmore", **sections, model__pooling="default", method__rank=2)


def test_an_expert_grows_on_a_node_and_its_start_is_charged(tmp_path: Path, cache: Path) -> None:
    server = expert_server(tmp_path)
    node_file = write_node(tmp_path / "clinic", cache, policy={"models": listed(server.config.model.name)})
    here = server.context(node_file)
    app(server.describe(), here)
    plan = plan_privacy(server.config, 60)
    start, step = (plan.start_noise_multiplier, 1.0), (plan.noise_multiplier, 12 / 60)
    first = app(server.train(1), here)
    assert metrics_of(first)["total-steps"] == 1 + 3
    assert set(LocalNode.open(node_file).ledger.history()) == {(*start, 1), (*step, 3)}
    public = Mixture.of(load_base(server.config, None)).public_digest
    assert dict(first.content["expert"]) == {"rank": "2", "public-digest": public}
    trained = arrays_of(first)
    assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B", "router", "router_bias"}
    # The next round goes on from the expert that comes, and makes no start.
    server.arrays = encode(trained)
    second = arrays_of(app(server.train(2), here))
    assert any(not torch.equal(second[name], trained[name]) for name in trained)
    assert set(LocalNode.open(node_file).ledger.history()) == {(*start, 1), (*step, 6)}


def test_a_start_that_the_ceiling_does_not_cover_is_refused(tmp_path: Path, cache: Path) -> None:
    server = expert_server(tmp_path)
    plan = plan_privacy(server.config, 60)
    steps_alone = ((plan.noise_multiplier, plan.sample_rate, 3),)
    without, both = (spent_epsilon("rdp", 1e-3, (*also, *steps_alone)) for also in ((), plan.start))
    assert without < both
    node_file = write_node(
        tmp_path / "clinic",
        cache,
        policy={"max_epsilon": (without + both) / 2, "models": listed(server.config.model.name)},
    )
    refused(app(server.describe(), server.context(node_file)), ClientErrorCode.BUDGET)
    LocalNode.open(node_file).ledger.register("f1", str(server.run), None, sent_digest(server.context(node_file)))
    refused(app(server.train(1), server.context(node_file)), ClientErrorCode.BUDGET)
    assert steps(node_file) == 0


def starting_server(tmp_path: Path, **options: Any) -> Server:
    """Make a server of a run of Fed-SB whose start is federated."""
    server = Server(tmp_path / "server")
    method = server.config.method.model_copy(update={"init": "federated", **options})
    server.config = server.config.model_copy(update={"method": method})
    return server


def asking_for_start(server: Server, exchange: int, sent: Arrays) -> Message:
    """Make a message of an exchange before the first round."""
    message = server.train(0)
    head = {name: array for name, array in decode(server.arrays).items() if not name.endswith("sb_R")}
    settings = {"server-round": 0, "exchange": exchange, "learning-rate": 1.0, "sketch": 3}
    about = {NODE_RECORD: message.content[NODE_RECORD]}
    message.content = RecordDict({"arrays": encode(head | sent), "config": ConfigRecord(settings), **about})
    return message


def test_a_node_helps_to_make_a_start_with_noise_of_its_own_and_charges_it_once(
    tmp_path: Path, node_file: Path
) -> None:
    server = starting_server(tmp_path)
    here, plan = server.context(node_file), plan_privacy(server.config, 60)
    start, step = (plan.start_noise_multiplier, 1.0), (plan.noise_multiplier, 12 / 60)
    assert metrics_of(app(server.describe(), here)) == {"num-examples": 60}
    first = app(asking_for_start(server, 1, {}), here)
    assert {name.rpartition(".")[2] for name in arrays_of(first)} == {"sb_B"}
    assert "loss" not in metrics_of(first)
    assert (metrics_of(first)["noise-multiplier"], metrics_of(first)["sample-rate"]) == start
    refused(app(asking_for_start(server, 1, {}), here), ClientErrorCode.STALE)
    basis = {name: sketch_basis(array) for name, array in arrays_of(first).items()}
    second = app(asking_for_start(server, 2, basis), here)
    assert {name.rpartition(".")[2] for name in arrays_of(second)} == {"sb_A"}
    assert all(array.shape[0] == 4 + 8 for array in arrays_of(second).values())
    assert LocalNode.open(node_file).ledger.history() == [(*start, 2)]
    # Another run that goes on after the start does not need it in its budget again.
    app(server.describe(), here)
    assert metrics_of(app(server.train(1), here))["total-steps"] == 2 + 3
    assert set(LocalNode.open(node_file).ledger.history()) == {(*start, 2), (*step, 3)}
    refused(app(asking_for_start(server, 2, basis), here), ClientErrorCode.STALE)


def test_an_answer_to_a_start_cannot_be_computed_from_what_the_server_knows(tmp_path: Path, cache: Path) -> None:
    server, answers = starting_server(tmp_path), []
    for name in ("one", "two"):
        here = server.context(write_node(tmp_path / name, cache))
        app(server.describe(), here)
        answers.append(arrays_of(app(asking_for_start(server, 1, {}), here)))
    assert all(float((array - answers[1][name]).abs().min()) > 0 for name, array in answers[0].items())


def test_a_node_bounds_the_noise_of_a_start(tmp_path: Path, cache: Path) -> None:
    server = starting_server(tmp_path, init_share=0.99)
    plan = plan_privacy(server.config, 60)
    assert plan.start_noise_multiplier is not None
    assert plan.start_noise_multiplier < plan.noise_multiplier
    least = (plan.start_noise_multiplier + plan.noise_multiplier) / 2
    node_file = write_node(tmp_path / "clinic", cache, policy={"min_noise_multiplier": least})
    refused(app(server.describe(), server.context(node_file)), ClientErrorCode.POLICY)
    refused(app(asking_for_start(server, 1, {}), server.context(node_file)), ClientErrorCode.STALE)
    assert steps(node_file) == 0


def test_a_run_without_such_a_start_has_no_exchange_before_its_rounds(server: Server, node_file: Path) -> None:
    app(server.describe(), server.context(node_file))
    refused(app(asking_for_start(server, 1, {}), server.context(node_file)), ClientErrorCode.STALE)
    assert steps(node_file) == 0


def test_every_format_trains_alike(tmp_path: Path, cache: Path) -> None:
    frame, results = pd.DataFrame(reviews()), []
    server = Server(tmp_path / "server", privacy__mode="none")
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        node_file = write_node(tmp_path / suffix, cache, data={"path": f"own.{suffix}"})
        node_file.write_text(node_file.read_text().replace("max_epsilon = 8.0", "allow_non_private = true"))
        path = node_file.parent / f"own.{suffix}"
        if suffix == "jsonl":
            frame.to_json(path, orient="records", lines=True)
        elif suffix == "parquet":
            frame.to_parquet(path)
        else:
            frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
        app(server.describe(), server.context(node_file))
        reply = app(server.train(1), server.context(node_file))
        assert metrics_of(reply)["loss"] > 0
        assert LocalNode.open(node_file).ledger.history() == [(0.0, 1.0, 3)]
        results.append(arrays_of(reply))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


# Whose randomness it is.


def test_the_runs_seed_determines_neither_noise_nor_sampling(
    tmp_path: Path, cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[tuple[int, ...]]] = []
    original = TokenTable.batch

    def record(self: TokenTable, rows: Any, device: Any = "cpu") -> Any:
        batches[-1].append(tuple(sorted(map(int, rows))))
        return original(self, rows, device)

    monkeypatch.setattr(TokenTable, "batch", record)
    found = []
    for number in (1, 2):
        node_file = write_node(tmp_path / f"clinic{number}", cache)
        here = server.context(node_file)
        app(server.describe(), here)
        batches.append([])
        found.append(arrays_of(app(server.train(1), here)))
    # Run, seed, round, client number, arrays and examples are the same: all that a server sends or knows.
    assert batches[0] != batches[1]
    assert all(not torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert len(set(batches[0])) == len(batches[0]) == 3  # every step draws anew


def test_a_simulated_client_follows_the_seed(tmp_path: Path) -> None:
    rows = [{"text": row["note"], "label": row["verdict"]} for row in reviews()]
    path = str(write_csv(tmp_path / "all.csv", rows))
    server = Server(tmp_path / "server", data__name=path, data__partition={"clients": 1})
    found = []
    for _ in range(2):
        here = Context(
            run_id=server.run,
            node_id=1,
            node_config={"partition-id": 0, "simulated": True},
            state=RecordDict(),
            run_config={"config": server.config.to_toml()},
        )
        found.append(arrays_of(app(server.train(1), here)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# What the owner's policy refuses, whatever the server sends.


@pytest.mark.parametrize(
    ("policy", "run", "reason"),
    [
        ({"min_noise_multiplier": 5.0}, {}, "PolicyError: min_noise_multiplier = 5.0"),
        ({"max_grad_norm": 0.5}, {}, "PolicyError: max_grad_norm = 0.5"),
        ({"max_sample_rate": 0.1}, {}, "PolicyError: max_sample_rate = 0.1"),
        ({}, {"privacy__mode": "none"}, "PolicyError: allow_non_private = false"),
        (
            {},
            {"privacy__target_epsilon": "", "privacy__noise_multiplier": 0.0},
            "PolicyError: allow_non_private = false",
        ),
    ],
)
def test_weaker_privacy_than_the_owner_accepts(
    tmp_path: Path, cache: Path, policy: dict[str, Any], run: dict[str, Any], reason: str
) -> None:
    node_file = write_node(tmp_path / "clinic", cache, policy=policy)
    weak = Server(tmp_path / "server", **run)
    here = weak.context(node_file)
    assert refused(app(weak.describe(), here), ClientErrorCode.POLICY) == reason
    # Training looks again: the owner may have changed the policy since.
    LocalNode.open(node_file).ledger.register(weak.federation, str(weak.run), LABELS, sent_digest(here))
    assert refused(app(weak.train(1), here), ClientErrorCode.POLICY) == reason
    assert steps(node_file) == 0


def test_a_model_whose_examples_depend_on_each_other_costs_a_node_nothing(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = str(architectures.save("convbert", tmp_path / "convbert"))
    node_file = write_node(tmp_path / "clinic", cache, policy={"models": listed(model)})
    given = {"model__num_hidden_layers": 2, "method__target_modules": ["query", "value"]}
    given["known"] = "the film was good and dull"
    mixing = Server(tmp_path / "server", model__name=model, **given)
    here = mixing.context(node_file)
    assert not app(mixing.describe(), here).has_error()
    assert refused(app(mixing.train(1), here), ClientErrorCode.INPUT) == "InputError"
    assert steps(node_file) == 0
    assert "examples depend on their batch" in caplog.text


def test_the_budget_is_the_owners_over_all_runs(tmp_path: Path, cache: Path) -> None:
    node_file = write_node(tmp_path / "clinic", cache, policy={"max_epsilon": 3.5})
    first = Server(tmp_path / "server", run=1, federation="first")
    app(first.describe(), first.context(node_file))
    assert not app(first.train(1), first.context(node_file)).has_error()
    # A second run, whatever its server calls its budget, gets what is left.
    second = Server(tmp_path / "server", run=2, federation="second", privacy__target_epsilon=100.0)
    reply = app(second.describe(), second.context(node_file))
    left = LocalNode.open(node_file).ledger.left()
    assert left is not None
    assert 0 < left < 3.5
    assert refused(reply, ClientErrorCode.BUDGET) == f"BudgetError: epsilon left = {left:.4g}"
    LocalNode.open(node_file).ledger.register("second", "2", LABELS, sent_digest(second.context(node_file)))
    assert "epsilon left" in refused(app(second.train(1), second.context(node_file)), ClientErrorCode.BUDGET)
    assert steps(node_file) == 3
    # The owner may raise the ceiling; the ledger goes on from where it was.
    node_file.write_text(node_file.read_text().replace("max_epsilon = 3.5", "max_epsilon = 1000.0"))
    assert not app(second.train(1), second.context(node_file)).has_error()
    assert steps(node_file) == 6


def test_a_round_that_was_lost_and_is_redone_is_paid_for_twice(node_file: Path, tmp_path: Path) -> None:
    """The noise of the two is not the same, so both are releases; in the end the budget lacks a round."""
    rounds = 4
    before = Server(tmp_path / "server", run=1)
    app(before.describe(), before.context(node_file))
    lost = app(before.train(1), before.context(node_file))  # the server stops before it records the round
    after = Server(tmp_path / "server", run=2)  # of the same federation: --resume
    app(after.describe(), after.context(node_file))
    redone = app(after.train(1), after.context(node_file))
    assert any(not torch.equal(a, arrays_of(redone)[name]) for name, a in arrays_of(lost).items())
    metrics, plan = metrics_of(redone), plan_privacy(after.config, 60)
    assert (metrics["steps"], metrics["total-steps"], steps(node_file)) == (3, 6, 6)
    twice = spent_epsilon("rdp", 1e-3, ((plan.noise_multiplier, 12 / 60, 6),))
    assert metrics["epsilon"] == pytest.approx(twice)
    assert metrics["epsilon"] > metrics_of(lost)["epsilon"]
    for server_round in range(2, rounds):
        assert not app(after.train(server_round), after.context(node_file)).has_error()
    assert "epsilon left" in refused(app(after.train(rounds), after.context(node_file)), ClientErrorCode.BUDGET)


# Stale and replayed messages cost nothing.


def test_old_replayed_and_foreign_messages_cost_nothing(node_file: Path, server: Server) -> None:
    here = server.context(node_file)
    assert refused(app(server.train(1), here), ClientErrorCode.STALE) == "StaleError"  # never described
    app(server.describe(), here)
    assert not app(server.train(2), here).has_error()
    for stale in (server.train(2), server.train(1)):
        refused(app(stale, here), ClientErrorCode.STALE)
    other = Server(node_file.parent / "s", run=77, federation="f2")
    refused(app(other.train(3), other.context(node_file)), ClientErrorCode.STALE)  # a run that nobody described
    refused(app(server.train(3), server.context(node_file, run=77)), ClientErrorCode.STALE)  # in another's place
    late = server.train(3)
    late.metadata.created_at -= 100.0
    late.metadata.ttl = 60.0
    refused(app(late, here), ClientErrorCode.STALE)
    bare = server.train(3)
    del bare.content[NODE_RECORD]
    refused(app(bare, here), ClientErrorCode.STALE)
    assert steps(node_file) == 3
    # The server was resumed: its new run takes over, and the old one's messages are stale.
    resumed = Server(node_file.parent / "s", run=12)
    app(resumed.describe(), resumed.context(node_file))
    refused(app(server.train(3), here), ClientErrorCode.STALE)
    refused(app(server.describe(), here), ClientErrorCode.STALE)
    # What the federation spent before counts in its epsilon.
    assert metrics_of(app(resumed.train(2), resumed.context(node_file)))["total-steps"] == 6


def test_a_round_that_nobody_waits_for_any_more_spends_no_more(
    node_file: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = server.context(node_file)
    app(server.describe(), here)
    message = server.train(1)
    charge, began = Charge.step, time.monotonic()

    def slow(self: Charge) -> None:
        charge(self)
        # The first step takes longer than the server waits; what the wall clock does meanwhile changes nothing.
        monkeypatch.setattr(time, "monotonic", lambda: began + 2 * message.metadata.ttl)

    monkeypatch.setattr(Charge, "step", slow)
    refused(app(message, here), ClientErrorCode.STALE)
    assert steps(node_file) == 1


def test_a_run_trains_with_the_config_that_was_described(tmp_path: Path, cache: Path) -> None:
    """Another length would tokenise the owner's rows again, and another rank load another model, for no describe."""
    node_file = write_node(tmp_path / "clinic", cache, reviews(60, 77))
    described = Server(tmp_path / "server")
    given: list[dict[str, Any]] = [{"model__max_length": 9}, {"method__rank": 2}, {"client__local_steps": 2}]
    others = [Server(tmp_path / "server", **overrides) for overrides in given]
    app(described.describe(), described.context(node_file))
    tokens = set((cache / "tokens").iterdir())
    for other in others:
        here = other.context(node_file)
        assert refused(app(other.train(1), here), ClientErrorCode.STALE) == "StaleError"
        refused(app(other.describe(), here), ClientErrorCode.STALE)
    assert set((cache / "tokens").iterdir()) == tokens
    assert steps(node_file) == 0
    assert not app(described.train(1), described.context(node_file)).has_error()


def test_a_config_that_is_a_path_is_not_read(node_file: Path, server: Server, tmp_path: Path) -> None:
    (tmp_path / "owners.toml").write_text(server.config.to_toml(), encoding="utf-8")
    here = server.context(node_file)
    here.run_config = {"config": str(tmp_path / "owners.toml")}
    refused(app(server.describe(), here), ClientErrorCode.INPUT)
    refused(app(server.train(1), here), ClientErrorCode.STALE)


def test_a_message_without_the_frozen_arrays_costs_nothing(node_file: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "server", "ffa-lora", run__seed=12345)
    here = server.context(node_file)
    app(server.describe(), here)
    refused(app(server.train(1, initial=False), here), ClientErrorCode.NEEDS_INITIAL)
    assert steps(node_file) == 0
    assert not app(server.train(1), here).has_error()


# Labels and schema.


@pytest.mark.parametrize("names", [["bad", "excellent"], ["Bad", "Good"], ["good", "secret"]])
def test_other_labels_are_refused_without_naming_them(node_file: Path, server: Server, names: list[str]) -> None:
    reply = app(server.describe(names), server.context(node_file))
    assert refused(reply, ClientErrorCode.LABELS) == "LabelError"
    refused(app(server.train(1), server.context(node_file)), ClientErrorCode.STALE)
    assert steps(node_file) == 0


def test_a_node_may_lack_a_class_and_the_order_is_the_servers(tmp_path: Path, cache: Path, server: Server) -> None:
    rows = [row for row in reviews(120) if row["verdict"] == "good"]
    node_file = write_node(tmp_path / "clinic", cache, rows)
    reply = app(server.describe(["zest", "good", "bad"]), server.context(node_file))
    assert metrics_of(reply) == {"num-examples": 60}


@pytest.mark.parametrize(
    ("data", "reason"),
    [({"text": "no-such"}, "InputError"), ({"label": "note"}, "LabelError"), ({"format": "parquet"}, "InputError")],
)
def test_a_schema_that_does_not_fit(
    tmp_path: Path, cache: Path, server: Server, data: dict[str, str], reason: str
) -> None:
    node_file = write_node(tmp_path / "clinic", cache, data=data)
    reply = app(server.describe(), server.context(node_file))
    assert reply.error.reason == reason


def test_a_delta_that_would_allow_to_publish_an_example(tmp_path: Path, cache: Path, server: Server) -> None:
    node_file = write_node(tmp_path / "clinic", cache, policy={"delta": 0.1})
    assert refused(app(server.describe(), server.context(node_file)), ClientErrorCode.INPUT) == "InputError"


def test_a_changed_file_is_read_by_the_next_run(node_file: Path, server: Server) -> None:
    app(server.describe(), server.context(node_file))
    write_csv(node_file.parent / "notes.csv", reviews(90))
    later = Server(node_file.parent / "s", run=12, federation="f2")
    assert metrics_of(app(later.describe(), later.context(node_file))) == {"num-examples": 90}


def test_the_number_of_examples_does_not_depend_on_what_the_server_asks(tmp_path: Path, cache: Path) -> None:
    """Rows that were dropped by a server's tokenizer and length would count what it looks for, without noise."""
    rows = [{"question": "w5 " * (2 + 4 * (row % 3)), "answer": "w7"} for row in range(30)]
    sections = {"model__name": str(tiny.save_llama(tmp_path / "model")), "model__task": "causal-lm"}
    sections["known"] = tiny.KNOWN
    policy = {"models": listed(tmp_path / "model")}
    columns = {"prompt": "question", "answer": "answer"}
    node_file = write_node(tmp_path / "clinic", cache, rows, data=columns, policy=policy)
    for run, length in enumerate((16, 8, 2)):
        server = Server(
            tmp_path / "server", "fedit", run, f"f{run}", **sections, model__pooling="default", model__max_length=length
        )
        here = server.context(node_file)
        assert metrics_of(app(server.describe(), here)) == {"num-examples": 30}
        assert metrics_of(app(server.train(1), here))["sample-rate"] == 12 / 30


# Nothing of the data is in an error.


@given(st.text(min_size=1), st.sampled_from(ERRORS))
def test_an_exceptions_text_never_leaves(secret: str, kind: type[Exception]) -> None:
    marked = f"<{secret}>"
    error = kind("data.name", marked, marked) if issubclass(kind, InputError) else kind(marked)
    sent = outward_error(error)
    assert (sent.reason, sent.code) == (kind.__name__, error_code(error))
    assert is_outward(sent.reason)
    for text in (marked, f"{kind.__name__} {marked}", f"{kind.__name__}: {marked}", f"{kind.__name__}: a = {marked}"):
        assert not is_outward(text)


def test_an_exceptions_text_stays_in_the_nodes_log(
    node_file: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = server.context(node_file)
    app(server.describe(), here)

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(half, "train_cohort", fail)
    for error in (ValueError("a name"), GuardError("a name"), InputError("a", "a name", "a name")):
        caplog.clear()
        reply = app(server.train(1), here)
        assert reply.error.reason == type(error).__name__
        assert "a name" in caplog.text


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30))
def test_a_label_in_the_file_never_leaves(secret: str) -> None:
    from tempfile import TemporaryDirectory

    from fedlora.assets import cache_dir

    marked = f"diagnosis {secret}"
    rows = [{**row, "verdict": marked if number == 7 else row["verdict"]} for number, row in enumerate(reviews(20))]
    with TemporaryDirectory() as folder:
        node_file = write_node(Path(folder) / "clinic", cache_dir(), rows, policy={"delta": 1e-3})
        server = _shared_server()
        assert refused(app(server.describe(), server.context(node_file)), ClientErrorCode.LABELS) == "LabelError"


def _shared_server(made: list[Server] = []) -> Server:  # noqa: B006
    """Return one server for all examples of a property: it loads a model."""
    if not made:
        from tempfile import mkdtemp

        made.append(Server(Path(mkdtemp())))
    return made[0]


def test_a_refusal_says_key_and_numbers_alone() -> None:
    assert outward_error(PolicyError("max_grad_norm", 1.0, "secret")).reason == "PolicyError: max_grad_norm = 1.0"
    reason = outward_error(PolicyError("allow_non_private", False, "secret")).reason
    assert reason == "PolicyError: allow_non_private = false"
    assert outward_error(BudgetError("secret", 0.123456)).reason == "BudgetError: epsilon left = 0.1235"


def test_malformed_messages_are_errors_of_a_class(node_file: Path, server: Server) -> None:
    here = server.context(node_file)
    app(server.describe(), here)
    message = server.train(1)
    del message.content["arrays"]
    assert refused(app(message, here), ClientErrorCode.FAILED) == "KeyError"
    assert steps(node_file) == 0
    empty = train_message(1)
    empty.metadata.__dict__["_run_id"] = server.run
    assert refused(app(empty, here), ClientErrorCode.STALE) == "StaleError"
