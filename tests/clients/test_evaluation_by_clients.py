"""Clients evaluate on test examples of their own: what they sum, what leaves, and what the run says of it."""

from __future__ import annotations

import contextlib
import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from fedlora import simulate
from fedlora.clients import client_app, evaluation, resources
from fedlora.config import load_config
from fedlora.data.tokens import prepare_data
from fedlora.errors import ClientErrorCode, InputError
from fedlora.methods import methods
from fedlora.strategies.base import FederatedStrategy, get_strategy
from fedlora.strategies.evaluation import evaluating_clients, read_sums
from fedlora.strategies.federation import Federation
from fedlora.strategies.replies import ReplyError
from fedlora.strategies.server_app import resolve
from fedlora.study.forecast import forecast
from fedlora.tasks import get_task, tasks
from fedlora.training.evaluation import statistics
from tests import tiny
from tests.configs import BASE
from tests.messages import train_message

FORECAST = {"initial": "initial_bytes", "down": "downlink_bytes", "up": "uplink_bytes"}
WORDS = [f"w{number}" for number in range(4, tiny.VOCABULARY)]
PRIVATE = {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    yield
    resources.forget_data()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Return a tiny encoder and, under True, a tiny decoder."""
    folder = tmp_path_factory.mktemp("models")
    tiny.base_model("bert").save_pretrained(folder / "bert")  # type: ignore[operator]
    tiny.save_tokenizer(folder / "bert")
    return {False: folder / "bert", True: tiny.save_llama(folder / "llama")}


def row(task: str, number: int) -> dict[str, Any]:
    draw = random.Random(number)
    words = draw.choices(WORDS, k=draw.randint(2, 8))
    label: Any = {
        "sequence-classification": "abc"[number % 3],
        "multi-label-classification": [name for name in "abc" if draw.random() < 0.5],
        "regression": draw.random(),
        "token-classification": draw.choices(["O", "B-X", "I-X"], k=len(words)),
    }.get(task)
    text = words if task == "token-classification" else " ".join(words)
    return {"text": text} | ({} if label is None else {"label": label})


def content(task: str, models: dict[bool, Path], folder: Path, rows: int = 60, **sections: Any) -> dict[str, Any]:
    file = folder / f"{task}.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps(row(task, number)) + "\n" for number in range(rows)))
    result: dict[str, Any] = {
        "run": {"rounds": 2, "seed": 1},
        "model": {"name": str(models[get_task(task).causal]), "task": task, "max_length": 12},
        "data": {"name": str(file), "client_test": 0.3, "partition": {"clients": 3}},
        "method": {"name": "fedit", "rank": 2},
        "client": {"batch_size": 4, "local_steps": 1, "learning_rate": 0.05},
        "server": {"fraction_evaluate": 1.0},
        "simulation": {"workers": 0},
    }
    for section, values in sections.items():
        result[section] = {**result.get(section, {}), **values}
    return result


@pytest.fixture
def union(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Evaluate the server's model on all clients' test examples together, after every round."""
    found: list[dict[str, float]] = []
    ask = Federation._ask

    def both(self: Federation, server_round: int) -> dict[str, Any]:
        told = ask(self, server_round)
        assert self.data.client_test is not None
        rows, table = np.concatenate(list(self.data.client_test)), self.data.train
        sums = {name: values.sum(0) for name, values in statistics(self.adapted, table, rows, 7).items()}
        found.append(table.task.metrics(sums) | {"examples": len(rows)})
        return told

    monkeypatch.setattr(Federation, "_ask", both)
    return found


@pytest.mark.parametrize("task", sorted(tasks()))
def test_the_clients_sums_are_the_central_evaluation_of_their_union(
    task: str, models: dict[bool, Path], tmp_path: Path, union: list[dict[str, float]]
) -> None:
    result = simulate(content(task, models, tmp_path), output=tmp_path / "run")
    lines = [json.loads(line)["metrics"]["clients"] for line in (result.folder / "rounds.jsonl").open()]
    assert len(lines) == len(union) == 2
    for line, expected in zip(lines, union, strict=True):
        assert (line["clients"], line["failed"], line["covered"]) == (3, 0, True)
        assert expected == pytest.approx({name: line[name] for name in expected}, rel=1e-5, abs=1e-7)
    assert result.summary["final"]["clients"] == lines[-1]
    assert result.summary["fairness"] == lines[-1]["fairness"]
    rows = list(csv.DictReader((result.folder / "clients.csv").open()))
    assert [int(r["client"]) for r in rows] == [0, 1, 2]
    assert sum(int(r["examples"]) for r in rows) == lines[-1]["examples"]
    mean = sum(int(r["examples"]) * float(r["loss"]) for r in rows) / lines[-1]["examples"]
    if task != "causal-lm":  # there a token weighs, not an example
        assert mean == pytest.approx(lines[-1]["loss"], rel=1e-5)


def of_sequences() -> list[str]:
    """Return the methods that classify sequences."""
    found = []
    for name in methods():
        with contextlib.suppress(InputError):
            load_config({**BASE, "method": {"name": name}})
            found.append(name)
    return found


def sent_bytes(run: Path) -> dict[str, int]:
    """Sum a run's payload by direction, evaluation left out; it must be the formula's in every row."""
    rows = list(csv.DictReader((run / "communication.csv").open()))
    training = [r for r in rows if not r["direction"].startswith("evaluate")]
    assert [r for r in training if r["payload_bytes"] != r["formula_bytes"]] == []
    return {way: sum(int(r["payload_bytes"]) for r in rows if r["direction"] == way) for way in FORECAST}


def forecast_bytes(given: dict[str, Any] | Path) -> dict[str, int]:
    """Return what a run is forecast to send, by direction."""
    found = forecast(resolve(load_config(given)))
    return {way: getattr(found, name) for way, name in FORECAST.items()}


@pytest.mark.parametrize("name", of_sequences())
def test_every_method_evaluates_what_its_round_made(
    name: str, models: dict[bool, Path], tmp_path: Path, union: list[dict[str, float]]
) -> None:
    """Whoever is asked to train or to evaluate, clients have the server's model, and the bytes are the formula's."""
    given = content(
        "sequence-classification",
        models,
        tmp_path,
        method={"name": name},
        run={"rounds": 5},
        server={"fraction_train": 0.5},
    )
    whole, part = (
        simulate(given, {"server.fraction_evaluate": share}, output=tmp_path / f"{share}") for share in (1.0, 0.4)
    )
    strategy = get_strategy(name)
    is_one_model = strategy.client_arrays is FederatedStrategy.client_arrays and not any(
        role.home for r in (1, 2) for role in strategy.roles(load_config(given), r).values()
    )
    lines = [json.loads(line)["metrics"]["clients"] for line in (whole.folder / "rounds.jsonl").open()]
    assert len(lines) == 5
    for line, expected in zip(lines, union, strict=False):
        assert line["examples"] == expected["examples"]
        if is_one_model:
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for result in (whole, part):
        assert sent_bytes(result.folder) == forecast_bytes(result.folder / "config.toml")
    assert (whole.folder / "adapter" / "adapter_model.safetensors").read_bytes() == (
        part.folder / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_owners_evaluate_their_own_experts(models: dict[bool, Path], tmp_path: Path) -> None:
    given = content("causal-lm", models, tmp_path, method={"name": "flexmore"}, run={"rounds": 1})
    result = simulate(given, output=tmp_path / "run")
    assert result.summary["final"]["clients"]["clients"] == 3
    rows = list(csv.DictReader((result.folder / "clients.csv").open()))
    assert len({r["loss"] for r in rows}) == 3


def test_evaluation_changes_nothing_that_is_trained_and_is_metered_apart(
    models: dict[bool, Path], tmp_path: Path
) -> None:
    def run(name: str, share: float) -> Any:
        given = content("sequence-classification", models, tmp_path, server={"fraction_evaluate": share})
        result = simulate(given, output=tmp_path / name)
        return result, list(csv.DictReader((result.folder / "communication.csv").open()))

    (without, rows), (result, all_rows) = run("without", 0.0), run("with", 1.0)
    training = [r for r in all_rows if not r["direction"].startswith("evaluate")]
    assert training == rows
    weights = [(r.folder / "adapter" / "adapter_model.safetensors").read_bytes() for r in (without, result)]
    assert weights[0] == weights[1]
    evaluation = [r for r in all_rows if r["direction"].startswith("evaluate")]
    assert {r["direction"] for r in evaluation} == {"evaluate_down", "evaluate_up"}
    assert len(evaluation) == 2 * 2 * 3
    assert all(r["payload_bytes"] == "0" for r in evaluation if r["direction"] == "evaluate_up")
    sent = result.summary["communication"]
    assert sent["evaluation_bytes"] == sum(int(r["message_bytes"]) for r in evaluation)
    assert {k: v for k, v in sent.items() if k != "evaluation_bytes"} == without.summary["communication"]
    assert "clients" not in without.summary["final"]


def test_a_share_of_the_clients_is_asked_by_seed(models: dict[bool, Path], tmp_path: Path) -> None:
    given = content(
        "sequence-classification",
        models,
        tmp_path,
        server={"fraction_evaluate": 0.34, "fraction_train": 0.34},
        run={"rounds": 4},
    )
    asked = []
    for name in ("a", "b"):
        result = simulate(given, output=tmp_path / name)
        rows = list(csv.DictReader((result.folder / "communication.csv").open()))
        asked.append([(r["round"], r["client"]) for r in rows if r["direction"] == "evaluate_down"])
        # The first contact carries what is sent once, whichever message it is.
        initial = [r["client"] for r in rows if r["direction"] == "initial"]
        assert len(initial) == len(set(initial))
        formula = {r["direction"]: r["formula_bytes"] == r["payload_bytes"] for r in rows}
        assert all(formula[way] for way in formula if not way.startswith("evaluate"))
    assert asked[0] == asked[1]
    assert len(asked[0]) == 4
    assert len({client for _, client in asked[0]}) > 1


def test_clients_evaluate_whenever_the_server_does(models: dict[bool, Path], tmp_path: Path) -> None:
    """And the forecast knows when that is: arrays that are sent once go to whoever is asked first for anything."""
    given = content(
        "regression",
        models,
        tmp_path,
        data={"partition": {"clients": 8}},
        method={"name": "ffa-lora"},
        server={"evaluate_every": 2, "fraction_evaluate": 0.25, "fraction_train": 0.125},
        run={"rounds": 3, "seed": 3},  # with this seed an evaluation after round 1 would ask one more client
    )
    result = simulate(given, output=tmp_path / "run")
    rounds = [json.loads(line)["metrics"] for line in (result.folder / "rounds.jsonl").open()]
    assert ["loss" in metrics for metrics in rounds] == [False, True, True]
    assert ["clients" in metrics for metrics in rounds] == [False, True, True]
    assert sent_bytes(result.folder) == forecast_bytes(given)


def test_who_evaluates_depends_on_the_clients_numbers_and_refusals_alone() -> None:
    def asked(order: tuple[int, ...], share: float) -> list[list[int]]:
        made = get_strategy("fedit")(load_config(BASE, {"data.client_test": 0.3, "server.fraction_evaluate": share}))
        made.nodes = {client: 100 - client for client in order}
        made.evaluation.fail(2, ClientErrorCode.POLICY, "its owner does not allow it")
        made.evaluation.fail(3, ClientErrorCode.FAILED, "once")
        return [evaluating_clients(made, server_round) for server_round in range(1, 6)]

    forwards, backwards = (0, 1, 2, 3, 4), (4, 3, 2, 1, 0)
    assert asked(backwards, 1.0) == asked(forwards, 1.0) == [[0, 1, 3, 4]] * 5
    some = asked(forwards, 0.4)
    assert asked(backwards, 0.4) == some
    assert all(len(clients) == 2 for clients in some)
    assert {client for clients in some for client in clients} == {0, 1, 3, 4}


def test_a_resumed_run_ends_as_one_that_never_stopped(
    models: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = content("sequence-classification", models, tmp_path, server={"fraction_evaluate": 0.7}, run={"rounds": 3})
    whole = simulate(given, output=tmp_path / "whole")
    ask = Federation._ask

    def stop(self: Federation, server_round: int) -> dict[str, Any]:
        if server_round == 2:
            raise KeyboardInterrupt
        return ask(self, server_round)

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_ask", stop)
        with pytest.raises(KeyboardInterrupt):
            simulate(given, output=tmp_path / "parts")
    resumed = simulate(given, output=tmp_path / "parts", resume=True)
    assert resumed.summary["final"] == whole.summary["final"]
    for file in ("clients.csv", "communication.csv"):
        assert (resumed.folder / file).read_text() == (whole.folder / file).read_text()


def test_what_is_held_out_is_not_trained_on(models: dict[bool, Path], tmp_path: Path) -> None:
    given = content("regression", models, tmp_path, rows=41)
    data, other = (prepare_data(load_config({**given, "data": {**given["data"], "seed": seed}})) for seed in (5, 6))
    nothing = {"server.fraction_evaluate": 0, "data.client_test": None}
    whole = prepare_data(load_config(given, nothing))
    assert data.client_test is not None
    assert other.client_test is not None
    for client, rows in enumerate(whole.partition):
        train, held = data.partition[client], data.client_test[client]
        assert len(held) == round(0.3 * len(rows))
        assert sorted([*train, *held]) == list(rows)
    assert any(list(a) != list(b) for a, b in zip(data.client_test, other.client_test, strict=True))
    assert whole.client_test is None


def test_a_client_with_one_example_trains_on_it(models: dict[bool, Path], tmp_path: Path) -> None:
    given = content("regression", models, tmp_path, rows=5, data={"partition": {"clients": 4}})
    result = simulate(given, output=tmp_path / "run")
    found = result.summary["final"].get("clients", {})
    assert found == {}
    assert [json.loads(line)["clients"] for line in (result.folder / "rounds.jsonl").open()] == [[0, 1, 2, 3]] * 2


def test_under_privacy_it_is_refused_or_declared(models: dict[bool, Path], tmp_path: Path) -> None:
    given = content("sequence-classification", models, tmp_path, privacy=PRIVATE)
    with pytest.raises(InputError, match="evaluate_not_covered"):
        load_config(given)
    given["server"]["evaluate_not_covered"] = True
    final = simulate(given, output=tmp_path / "run").summary["final"]["clients"]
    assert final["covered"] is False
    assert final["fairness"]["covered"] is False


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.client_test", None, "server.fraction_evaluate = 1.0: needs data.client_test"),
        ("data.client_test", "file.csv", "is no share"),
        ("data.client_test", 1.0, "data.client_test"),
        ("server.fraction_evaluate", 1.5, "server.fraction_evaluate"),
    ],
)
def test_what_makes_no_sense_is_refused(key: str, value: Any, message: str, models: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_config(content("regression", models, tmp_path), {key: value})


# What a client's answer may be.


def answered(**metrics: Any) -> Message:
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=train_message(100))


SHAPES = {"loss": (), "hits": (3,)}
GOOD = {"num-examples": 4, "loss": 2.5, "hits": [1.0, 0.0, 2.0]}


def test_an_answer_is_a_number_for_every_statistic() -> None:
    examples, sums = read_sums(answered(**GOOD), SHAPES)
    assert (examples, float(sums["loss"]), sums["hits"].tolist()) == (4, 2.5, [1.0, 0.0, 2.0])
    assert read_sums(answered(**{"num-examples": 0}), SHAPES) == (0, {})


@pytest.mark.parametrize(
    "change",
    [
        {"num-examples": -1},
        {"num-examples": 2.0},
        {"num-examples": 10**9},
        {"loss": float("nan")},
        {"loss": float("inf")},
        {"loss": [1.0, 2.0]},
        {"hits": [1.0]},
        {"hits": 3.0},
        {"hits": [1.0, 1e307, 0.0]},
        {"others": 1.0},
    ],
)
def test_any_other_answer_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ReplyError):
        read_sums(answered(**{**GOOD, **change}), SHAPES)
    more = answered(**GOOD)
    more.content["texts"] = MetricRecord({"length": 3})
    for message in (more, Message(RecordDict(), reply_to=train_message(100))):
        with pytest.raises(ReplyError, match="metrics and nothing else"):
            read_sums(message, SHAPES)


def test_a_wrong_answer_costs_its_client_its_place(
    models: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = evaluation.evaluate_own

    def wrong(message: Message, context: Any) -> Message:
        client = int(context.node_config["partition-id"])
        if client == 1:
            raise ValueError("broken")
        reply = own(message, context)
        if client == 2:
            metrics: Any = reply.content["metrics"]
            metrics["loss"] = float("nan")
        return reply

    monkeypatch.setattr(client_app, "evaluate_own", wrong)
    result = simulate(content("regression", models, tmp_path), output=tmp_path / "run")
    final = result.summary["final"]["clients"]
    assert (final["clients"], final["failed"]) == (1, 2)
    assert [r["client"] for r in csv.DictReader((result.folder / "clients.csv").open())] == ["0"]
