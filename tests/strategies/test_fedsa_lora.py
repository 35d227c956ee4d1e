"""FedSA-LoRA: A is averaged; B and the head never travel; a client is scored with its own model on its own examples."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord

import fedlora
from fedlora.adapters.model import linear_shape
from fedlora.clients.resources import client_data
from fedlora.config import load_config
from fedlora.errors import InputError
from fedlora.methods import methods
from fedlora.results.checkpoint import Checkpoint
from fedlora.simulation.simulated_grid import SimulatedGrid
from fedlora.strategies.base import Contact, Payload
from tests.small_runs import WEIGHTS, DrawnRounds, Watched, World, world

SHARES = [weight / sum(WEIGHTS) for weight in WEIGHTS]
SCORED: dict[str, Any] = {
    "data": {"client_test": 0.4},
    "server": {"fraction_evaluate": 1.0},
    "client": {"optimizer": "adamw", "learning_rate": 0.05},
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("own")) as made:
        yield made


@pytest.fixture(scope="module")
def travelled() -> set[tuple[str, str]]:
    """Names of arrays that were sent and came back, with the key of their record."""
    return set()


@pytest.fixture(scope="module")
def scored(here: World, travelled: set[tuple[str, str]]) -> Watched:
    exchange = SimulatedGrid.send_and_receive

    def noted(self: SimulatedGrid, messages: Any, *, timeout: float | None = None) -> Iterator[Any]:
        messages = list(messages)
        for message in messages:
            note(message)
        for reply in exchange(self, messages, timeout=timeout):
            note(reply)
            yield reply

    def note(message: Any) -> None:
        for key, record in message.content.items() if message.has_content() else ():
            if isinstance(record, ArrayRecord):
                travelled.update((key, name) for name in record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedGrid, "send_and_receive", noted)
        return here.run(here.content("fedsa-lora", "bert", **SCORED))


def test_only_a_and_the_heads_start_travel(scored: Watched, travelled: set[tuple[str, str]]) -> None:
    kinds = {(key == "arrays", name.rpartition(".")[2]) for key, name in travelled}
    assert kinds == {(True, "lora_A"), (False, "weight"), (False, "bias")}, "in a round A alone; once the head"
    with closing(Checkpoint(scored.folder / "checkpoint" / "state.sqlite")) as checkpoint:
        saved = {key: {n.rpartition(".")[2] for n in checkpoint.get_arrays(key) or {}} for key in ("trained", "frozen")}
    assert saved == {"trained": {"lora_A"}, "frozen": {"weight", "bias"}}


def test_a_clients_score_is_its_own_models_on_its_own_examples(scored: Watched) -> None:
    with (scored.folder / "clients.csv").open() as stream:
        rows = {int(row["client"]): row for row in csv.DictReader(stream)}
    assert len(rows) == 4
    losses: dict[int, list[float]] = {}
    for client, row in rows.items():
        table, own = client_data(scored.config).own_test(client)
        batch = table.batch(own, torch.device("cpu"))
        for whose in rows:
            model, _ = fedlora.load(scored.folder, whose)
            with torch.no_grad():
                logits = model(batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
            losses.setdefault(client, []).append(float(table.task.loss(logits, batch["labels"]).mean()))
        assert losses[client][client] == pytest.approx(float(row["loss"]), rel=1e-4)
        assert losses[client][client] != pytest.approx(losses[client][client - 1], rel=1e-3), "another's is another"


def test_the_summary_is_marked_and_has_no_other_scores_than_the_clients(scored: Watched) -> None:
    final = scored.summary["final"]
    assert scored.summary["personalised"]
    assert scored.summary["start"] == {}
    assert final["loss"] == final["clients"]["loss"]
    assert final["accuracy"] == final["clients"]["accuracy"]
    assert final["clients"]["clients"] == 4
    with (scored.folder / "clients.csv").open() as stream:
        tested = sum(int(row["examples"]) for row in csv.DictReader(stream))
    assert scored.summary["test_examples"] == tested


def test_without_an_evaluation_by_clients_nothing_is_scored_and_the_run_says_so(here: World) -> None:
    run = here.run(here.content("fedsa-lora", "bert", run={"rounds": 1}))
    assert (run.summary["final"], run.summary["test_examples"]) == ({}, None)
    assert [line["metrics"] for line in run.lines()] == [{}]
    assert "set server.fraction_evaluate, and data.client_test" in (run.folder / "run.log").read_text()


def test_a_score_on_the_server_is_refused(here: World) -> None:
    with pytest.raises(InputError, match=r"data\.validation = .*models of fedsa-lora are its clients' own"):
        load_config(here.content("fedsa-lora", "bert", data={"validation": 0.2}))


def test_the_table_tells_who_has_no_global_model(here: World) -> None:
    found = {
        name
        for name, m in methods().items()
        for kind in here.kinds(name)[:1]
        if m.personalised(load_config(here.content(name, kind)))
    }
    assert "fedsa-lora" in found
    assert not found & {"fedit", "ffa-lora", "fed-sb", "fedsvd", "rolora", "fedex-lora", "flexmore"}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_a_is_the_mean(dtype: str, tolerance: float) -> None:
    rounds = DrawnRounds("fedsa-lora", "llama", dtype)
    for server_round in (1, 2):
        sent, result = rounds.round(server_round)
        names = set(rounds.adapted.names(["lora_A"]))
        assert all(set(arrays) == names for arrays in (*sent, result))
        for name in names:
            mean = sum(p * arrays[name] for p, arrays in zip(SHARES, sent, strict=True))
            torch.testing.assert_close(result[name], mean, rtol=0, atol=tolerance)


def test_bytes() -> None:
    rounds = DrawnRounds("fedsa-lora")
    sizes = rounds.strategy.sizes(rounds.adapted)
    a = sum(3 * linear_shape(adapter.base)[1] for adapter in rounds.adapted.adapters.values())
    assert rounds.strategy.payload(sizes, Contact(1, 0, None, {})) == Payload(3 * 32 + 3, a, a)
