"""A round of two exchanges: each is sent, metered, charged and forecast by itself. The method is this test's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedlora.clients.participant import _exchange, _turn
from fedlora.communication.wire import encode
from fedlora.errors import InputError, StaleError
from fedlora.methods import get_method
from fedlora.privacy.calibration import plan_privacy, spent_epsilon
from fedlora.results.checkpoint import Checkpoint
from fedlora.strategies.base import FederatedStrategy
from fedlora.training import cohort
from tests.llama_runs import OWNERS, LlamaRuns, adapter, lines, payload, runs_of_methods, table
from tests.messages import FIRST_NODE, FakeGrid, records

METHOD = '''
"""The clients' gradients of B are summed, the server steps along them, and both factors are trained from there."""

from dataclasses import replace

import numpy as np
import torch

from fedlora.clients.half import ClientHalf
from fedlora.strategies.fed_sb import mean_gradients
from fedlora.training import train_cohort
from tests.drawn_methods import Twice


class TwoPasses(Twice):
    name, title, paper = "two-passes", "A gradient sum, then training", "none"
    client = "two_passes:Half"
    gap = None

    def start_arrays(self, adapted, data):
        start = super().start_arrays(adapted, data)
        pooled = mean_gradients(adapted, data.train, np.arange(len(data.train)), 64)
        self.expected = {f"{path}.lora_B": -g @ start[f"{path}.lora_A"].T for path, g in pooled.items()}
        return start

    def aggregate(self, updates):
        result = super().aggregate(updates)
        if self.exchange == 1 and self.gap is None:
            assert set(result) == set(self.expected)
            self.gap = max(float((result[name] - array).abs().max()) for name, array in self.expected.items())
        return result

    def state_dict(self):
        return {"gap": self.gap}

    def load_state_dict(self, state):
        self.gap = state["gap"]

    def facts(self, adapted):
        return {"gap": self.gap}


class Half(ClientHalf):
    def train(self, table, jobs, config):
        if jobs[0].exchange == 1:
            # One step of SGD at rate 1 is the gradient, clipped and noised as any step is under DP.
            client = config.client.model_copy(update={"optimizer": "sgd"})
            jobs = [replace(job, learning_rate=1.0) for job in jobs]
            config = config.model_copy(update={"client": client})
        return train_cohort(self.adapted, table, jobs, config)
'''
ROUNDS, STEPS = 2, 3
SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"rounds": ROUNDS, "seed": 3},
    "method": {"name": "two-passes", "rank": 2},
    "client": {"local_steps": STEPS, "batch_size": 64},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaRuns]:
    with runs_of_methods(
        tmp_path_factory.mktemp("two-passes"),
        {"fedlora.methods": {"two-passes": "two_passes:TwoPasses"}},
        "two_passes",
        METHOD,
    ) as made:
        yield made


def test_each_exchange_is_metered_and_forecast_by_itself(runs: LlamaRuns) -> None:
    result, expected = runs.run(**SECTIONS), runs.forecast(**SECTIONS)
    assert all(line["counted"] and not line["failed"] for line in lines(result))
    rows = [row for row in table(result, "communication.csv") if row["round"] == "1" and row["client"] == "0"]
    assert [row["direction"] for row in rows] == ["down", "down", "up", "up"]
    first, second = (int(row["payload_bytes"]) for row in rows if row["direction"] == "up")
    assert 0 < first < second
    said = {"initial": expected.initial_bytes, "down": expected.downlink_bytes, "up": expected.uplink_bytes}
    assert {direction: payload(result, direction) for direction in said} == said
    assert expected.steps == ROUNDS * OWNERS * (1 + STEPS)


def test_the_first_exchange_sums_gradients_and_the_second_starts_from_its_result(runs: LlamaRuns) -> None:
    """The gap is to the gradient on all examples, pooled: clients weigh by their examples."""
    result = runs.run(**SECTIONS)
    assert result.summary["gap"] < 1e-6
    plain = runs.run(**{**SECTIONS, "method": {"name": "fedit", "rank": 2}})
    assert any(not torch.equal(array, adapter(plain)[name]) for name, array in adapter(result).items())


@pytest.mark.parametrize("wire", [{}, {"uplink_codec": "onebit"}])
def test_a_resumed_run_has_the_same_bits(runs: LlamaRuns, wire: dict[str, str]) -> None:
    whole, resumed = runs.run(**SECTIONS, wire=wire), runs.run(**SECTIONS, wire=wire, stop=1)
    found, again = adapter(whole), adapter(resumed)
    assert all(torch.equal(array, again[name]) for name, array in found.items())
    assert table(whole, "communication.csv") == table(resumed, "communication.csv")


def test_a_round_whose_second_exchange_gives_nothing_leaves_no_trace(
    runs: LlamaRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, moments, and who replied are those of before the round; what clients spent in it stays spent."""
    method: Any = get_method("two-passes")
    whole = method.aggregate_train

    def lost(self: FederatedStrategy, server_round: int, replies: Any) -> Any:
        record, mean = whole(self, server_round, replies)
        return (None if (server_round, self.exchange) == (2, 2) else record), mean

    monkeypatch.setattr(method, "aggregate_train", lost)
    result = runs.run(**{**SECTIONS, "run": {"rounds": 3, "seed": 3}}, server={"optimizer": "fedadam"})
    first, second, third = lines(result)
    assert [line["counted"] for line in (first, second, third)] == [True, False, True]
    assert first["metrics"] == second["metrics"] != third["metrics"]
    with closing(Checkpoint(result.folder / "checkpoint" / "state.sqlite")) as checkpoint:
        assert sorted(checkpoint.get("replied")) == ["1", "3"]
        steps = checkpoint.get("optimizer")["steps"]
    assert {(name.rpartition(".")[2], taken) for name, taken in steps.items()} == {("lora_A", 2), ("lora_B", 4)}


def test_each_exchange_is_charged_by_itself(runs: LlamaRuns) -> None:
    """The noise is calibrated for the steps of both, and the target is used up by them."""
    privacy = {"mode": "example", "target_epsilon": 8.0, "target_delta": 1e-3}
    sections = {**SECTIONS, "privacy": privacy, "client": {"local_steps": STEPS, "batch_size": 4}}
    result, config = runs.run(**sections), runs.config(**sections)
    rows = [row for row in table(result, "privacy.csv") if row["client"] == "3"]
    assert [(row["round"], int(row["steps"])) for row in rows] == [("1", 1), ("1", STEPS), ("2", 1), ("2", STEPS)]
    epsilons = [float(row["epsilon"]) for row in rows]
    assert all(before < after for before, after in pairwise(epsilons))
    taken = [(float(rows[0]["noise_multiplier"]), float(rows[0]["sample_rate"]), ROUNDS * (1 + STEPS))]
    assert epsilons[-1] == pytest.approx(spent_epsilon(config.privacy.accountant, 1e-3, tuple(taken)), rel=1e-9)
    assert 0.98 * 8 < result.summary["epsilon"]["max"] <= 8
    assert plan_privacy(config, 18).steps == ROUNDS * (1 + STEPS)


def test_the_noise_of_one_exchange_is_not_that_of_the_other(runs: LlamaRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same noise in both, whoever has both could subtract it."""
    drawn: list[bytes] = []

    def noted(self: cohort._Generators, seed: int, job: cohort.ClientJob, device: torch.device) -> None:
        begin(self, seed, job, device)
        assert self.noise is not None
        drawn.append(self.noise.get_state().numpy().tobytes())

    begin = cohort._Generators.__init__
    monkeypatch.setattr(cohort._Generators, "__init__", noted)
    runs.run(**SECTIONS)
    assert len(drawn) == len(set(drawn)) == 2 * ROUNDS * OWNERS


def test_a_reply_to_another_exchange_of_the_round_does_not_count(runs: LlamaRuns) -> None:
    strategy = get_method("two-passes")(runs.config(**SECTIONS))
    assert isinstance(strategy, FederatedStrategy)
    arrays = {"x.lora_A": torch.zeros(2, 3), "x.lora_B": torch.zeros(4, 2)}
    strategy.enter(1, 2)

    def answer(message: Message) -> Message:
        assert (message.metadata.group_id, message.content["config"]["exchange"]) == ("1/2", 2)
        reply = Message(records(arrays, num_examples=3), reply_to=message)
        if message.metadata.dst_node_id == FIRST_NODE:
            reply.metadata.group_id = "1"
        return reply

    grid = FakeGrid(answer)
    messages = strategy.configure_train(1, encode(arrays), ConfigRecord(), grid)
    strategy.aggregate_train(1, grid.send_and_receive(messages))
    assert sorted(strategy.report.metrics) == [1, 2]


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_client_refuses_an_exchange_that_there_is_not(runs: LlamaRuns, number: int) -> None:
    with pytest.raises(StaleError, match="no exchange"):
        _exchange(runs.config(**SECTIONS), asking(1, number))


def test_a_nodes_ledger_counts_exchanges(runs: LlamaRuns) -> None:
    """It takes each once, and none after a later one."""
    config = runs.config(**SECTIONS)
    assert [_turn(config, asking(r, e)) for r in (1, 2) for e in (1, 2)] == [1, 2, 3, 4]
    with pytest.raises(StaleError, match="no round 3"):
        _turn(config, asking(3, 1))
    plain = runs.config(method={"name": "fedit", "rank": 2})
    assert [_turn(plain, asking(r, 1)) for r in (1, 2, 50)] == [1, 2, 50]


def asking(server_round: int, exchange: int) -> Message:
    """A message of an exchange."""
    settings = ConfigRecord({"server-round": server_round, "exchange": exchange})
    return Message(RecordDict({"arrays": encode({}), "config": settings}), FIRST_NODE, "train")


def test_a_strategy_that_knows_no_exchanges_cannot_run_them(runs: LlamaRuns) -> None:
    with pytest.raises(InputError, match="cannot run the rounds of two-passes"):
        runs.run(**SECTIONS, strategy=lambda: FedAvg(fraction_evaluate=0.0))
