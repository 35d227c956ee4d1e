"""Clients that are late, or more than a round needs: they are left out, told, and charged for what they spent."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from flwr.serverapp.strategy import FedAvg

from fedlora.communication.broadcast import group_of, round_of
from fedlora.config import load_config, unused_keys
from fedlora.errors import ClientErrorCode, InputError
from fedlora.flower import set_message_id
from fedlora.reporting.report import write_report
from fedlora.reporting.runs import read_runs
from fedlora.results.folder import RunResult
from fedlora.results.privacy_spent import explain_privacy
from fedlora.strategies import nodes
from fedlora.strategies.base import get_strategy
from fedlora.strategies.nodes import AddressedGrid
from fedlora.strategies.server_app import resolve
from tests.configs import override
from tests.faulty_grid import SLOW, Faults, faulty, left_out
from tests.llama_runs import OWNERS, LlamaRuns, adapter, lines, table
from tests.messages import FIRST_NODE, FakeGrid, records, train_message

PRIVATE: dict[str, Any] = {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}
RESERVES: dict[str, Any] = {"fraction_train": 0.5, "over_sampling": 1.5}
"""Of four clients a round asks three, and takes two replies."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


def same(a: RunResult, b: RunResult) -> bool:
    first, second = adapter(a), adapter(b)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_round_goes_on_without_who_is_late(runs: LlamaRuns) -> None:
    deadline: dict[str, Any] = {"round_deadline": 10.0}
    with faulty({("2", 3): "slow"}):
        late = runs.run(server=deadline)
    assert left_out(table(late, "left_out.csv")) == {(2, 0): {3: "late"}}
    assert [line["counted"] for line in lines(late)] == [True] * 3
    with faulty({("2", 3): "lost"}):
        assert same(late, runs.run())
    with faulty({("2", 3): "slow"}):
        patient = runs.run(server={"timeout": 2 * SLOW})
    assert not (patient.folder / "left_out.csv").exists()
    assert not same(late, patient)


def test_who_did_not_get_its_turn_is_left_out_too_and_spent_nothing(runs: LlamaRuns) -> None:
    with faulty({("2", 1): "slow"}):
        result = runs.run(server={"round_deadline": 10.0}, privacy=PRIVATE)
    codes = {1: "late", 2: "no_reply", 3: "no_reply"}
    assert left_out(table(result, "left_out.csv")) == {(2, 0): codes}
    charged = Counter(int(row["client"]) for row in table(result, "privacy.csv"))
    assert charged == {0: 3, 1: 3, 2: 2, 3: 2}


@pytest.mark.parametrize("fault", ["slow", "nan"])
def test_a_client_that_trained_in_vain_is_charged_all_the_same(runs: LlamaRuns, fault: str) -> None:
    """Its result was made, and a server that it reached in another way would have it."""
    server: dict[str, Any] = {"round_deadline": 10.0}
    whole = runs.run(privacy=PRIVATE)
    with faulty({("3", 3): fault}):
        result = runs.run(privacy=PRIVATE, server=server)
    assert 3 not in (set(lines(result)[2]["clients"]) - {f["client"] for f in lines(result)[2]["failed"]})
    assert table(result, "privacy.csv") == table(whole, "privacy.csv")
    assert result.summary["epsilon"] == whole.summary["epsilon"]
    spent = explain_privacy(result.folder, "3")
    assert spent.epsilon == pytest.approx(spent.recorded)
    # What it spent counts when it is asked again: its ledger has it.
    with faulty({("2", 3): fault}):
        earlier = runs.run(privacy=PRIVATE, server=server)
    assert table(earlier, "privacy.csv") == table(whole, "privacy.csv")


def test_the_budget_of_whole_clients_is_that_of_the_sampled_whoever_is_late(runs: LlamaRuns) -> None:
    privacy: dict[str, Any] = {"mode": "client", "noise_multiplier": 1.0, "target_delta": 1e-3}
    with faulty({("2", 3): "slow"}):
        late = runs.run(privacy=privacy, server={"round_deadline": 10.0})
    assert table(late, "privacy.csv") == table(runs.run(privacy=privacy), "privacy.csv")


def test_a_round_takes_as_many_replies_as_fraction_train_says(runs: LlamaRuns) -> None:
    with faulty({}) as asked:
        result = runs.run(server=RESERVES)
    found = left_out(table(result, "left_out.csv"))
    for server_round in (1, 2, 3):
        turns = asked[str(server_round)]
        assert len(turns) == 3
        assert found[server_round, 0] == {turns[2]: "surplus"}
        assert lines(result)[server_round - 1]["surplus"] == [turns[2]]
    assert any(asked[group] != sorted(asked[group]) for group in asked)
    # What came of it is what would have come had the others alone answered.
    faults: Faults = {(group, turns[2]): "lost" for group, turns in asked.items()}
    with faulty(faults):
        assert same(result, runs.run(server={"fraction_train": 0.75}))


def test_a_reserve_takes_the_place_of_who_fails(runs: LlamaRuns) -> None:
    with faulty({}) as asked:
        runs.run(server=RESERVES)
    first, second, reserve = asked["2"]
    for fault, code in (("error", "failed"), ("nan", "reply"), ("lost", "no_reply")):
        with faulty({("2", first): fault}):
            result = runs.run(server=RESERVES)
        assert left_out(table(result, "left_out.csv"))[2, 0] == {first: code}
        assert lines(result)[1]["counted"]
    faults: Faults = {("1", asked["1"][2]): "lost", ("2", first): "lost", ("3", asked["3"][2]): "lost"}
    with faulty(faults):
        assert same(result, runs.run(server={"fraction_train": 0.75}))
    assert {second, reserve} == set(asked["2"]) - {first}


def test_a_reserve_that_was_not_needed_is_charged(runs: LlamaRuns) -> None:
    with faulty({}) as asked:
        result = runs.run(server=RESERVES, privacy=PRIVATE)
    trained = Counter(client for clients in asked.values() for client in clients)
    assert Counter(int(row["client"]) for row in table(result, "privacy.csv")) == trained
    states = {row["client"]: float(row["epsilon"]) for row in table(result, "privacy.csv")}
    for client, epsilon in states.items():
        assert explain_privacy(result.folder, client).epsilon == pytest.approx(epsilon)


def test_no_client_is_a_reserve_more_often_than_others() -> None:
    content: dict[str, Any] = {**override("data", {"name": "x", "partition": {"clients": 10}}), "server": RESERVES}
    strategy = get_strategy("fedit")(resolve(load_config(content)))
    strategy.nodes = dict(enumerate(range(100, 110)))
    reserves: Counter[int] = Counter()
    for server_round in range(1, 401):
        clients = strategy.sample(server_round)
        assert len(clients) == 8  # 7.5, rounded to even
        reserves.update(strategy.in_turn(server_round, clients)[5:])
    expected = 400 * 3 / 10
    assert sum(reserves.values()) == 1200
    assert float(sum((reserves[c] - expected) ** 2 / expected for c in range(10))) < 27.9  # chi squared, 9, 0.001


def test_a_run_with_reserves_resumes_to_the_same_bits(runs: LlamaRuns) -> None:
    assert same(runs.run(server=RESERVES), runs.run(server=RESERVES, stop=1))


def test_a_forecast_knows_of_reserves(runs: LlamaRuns) -> None:
    result = runs.run(server=RESERVES)
    measured = [int(r["payload_bytes"]) for r in table(result, "communication.csv") if r["direction"] == "up"]
    assert sum(measured) == runs.forecast(server=RESERVES).uplink_bytes


def test_the_report_counts_who_was_left_out_and_why(runs: LlamaRuns, tmp_path: Path) -> None:
    with faulty({("2", 3): "slow"}):
        result = runs.run(server={"round_deadline": 10.0})
    (read,) = read_runs([result.folder]).runs
    assert [(line.round, line.client, line.code) for line in read.left_out] == [(2, 3, "late")]
    write_report([result.folder], output=tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r'late <data value="1\.0" data-of="[^"]*" data-q="left_out\.late"', page)


@pytest.mark.parametrize(
    ("server", "key"),
    [
        ({"round_deadline": 60.0, "timeout": 60.0}, "round_deadline"),
        ({"over_sampling": 1.3}, "over_sampling"),
        ({"over_sampling": 1.3, "fraction_train": 0.5}, ""),
        ({"round_deadline": 30.0, "timeout": 60.0}, ""),
    ],
)
def test_keys_that_change_nothing_are_told(server: dict[str, Any], key: str) -> None:
    config = load_config({**override("data", {"name": "x", "partition": {"clients": 4}}), "server": server})
    told = {note.partition(" ")[0] for note in unused_keys(config)}
    assert told & {f"server.{name}" for name in server} == ({f"server.{key}"} if key else set())


@pytest.mark.parametrize(
    ("strategy", "tolerance"),
    [(None, 0.0), (lambda: FedAvg(fraction_evaluate=0.0), 1e-6)],  # Flower's takes clients in any order
    ids=["own", "flower"],
)
def test_a_late_reply_enters_no_other_round(runs: LlamaRuns, strategy: Any, tolerance: float) -> None:
    def gap(a: RunResult, b: RunResult) -> float:
        first, second = adapter(a), adapter(b)
        return max(float((first[name] - second[name]).abs().max()) for name in first)

    with faulty({("1", 2): "held", ("2", 0): "held"}):
        held = runs.run(strategy=strategy)
    with faulty({("1", 2): "lost", ("2", 0): "lost"}):
        lost = runs.run(strategy=strategy)
    assert gap(held, lost) <= tolerance
    told = (held.folder / "run.log").read_text()
    assert "client 2 answered to round '1', in round 2" in told
    assert gap(held, runs.run(strategy=strategy)) > 1e-5


def test_a_late_error_is_no_failure_of_another_round() -> None:
    content: dict[str, Any] = {**override("data", {"name": "x", "partition": {"clients": 3}})}
    strategy = get_strategy("fedit")(resolve(load_config(content)))
    strategy.nodes = {client: FIRST_NODE + client for client in range(3)}
    strategy.report.clients = [0, 1, 2]
    answers = [Message(records(), reply_to=train_message(FIRST_NODE + client, server_round=2)) for client in range(3)]
    late = Message(Error(ClientErrorCode.FAILED, "of before"), reply_to=train_message(FIRST_NODE, server_round=1))
    found = list(strategy.valid_replies([late, *answers], group_of(2)))
    assert [client for client, _ in found] == [0, 1, 2]
    assert strategy.report.failed == []


@pytest.mark.parametrize(("exchange", "attempt"), [(1, 0), (2, 0), (1, 1), (2, 3)])
def test_groups_tell_attempts_apart_and_name_their_round(exchange: int, attempt: int) -> None:
    group = group_of(7, exchange, attempt)
    assert round_of(train_message(1, server_round=group)) == 7  # type: ignore[arg-type]
    others = {group_of(7, e, a) for e in (1, 2, 3) for a in range(5) if (e, a) != (exchange, attempt)}
    assert group not in others
    assert len(others) == 14


# Real nodes.


class Nodes(FakeGrid):
    """Nodes of which each answers at one of the times that the server asks."""

    def __init__(self, order: list[list[int]]) -> None:
        super().__init__(lambda message: None)
        self.order, self.pushed = list(order), {}  # type: ignore[var-annotated]

    def push_messages(self, messages: Any) -> Any:
        for message in messages:
            set_message_id(message, f"m{message.metadata.dst_node_id}")
            self.pushed[message.metadata.message_id] = message
        return list(self.pushed)

    def pull_messages(self, message_ids: Any) -> Any:
        due = self.order.pop(0) if self.order else []
        return [Message(records(), reply_to=self.pushed[f"m{node}"]) for node in due if f"m{node}" in message_ids]


def test_nodes_that_are_slow_are_not_waited_for_once_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(nodes, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=slept.append))
    content: dict[str, Any] = {**override("data", {"name": "x", "partition": {"clients": OWNERS}}), "server": RESERVES}
    strategy = get_strategy("fedit")(resolve(load_config(content)))
    strategy.nodes, strategy.waits = {client: FIRST_NODE + client for client in range(OWNERS)}, True
    strategy.report.clients = [0, 1, 3]
    grid = Nodes([[], [FIRST_NODE + 3], [], [], [FIRST_NODE], [FIRST_NODE + 1]])
    asked = [train_message(FIRST_NODE + client) for client in (0, 1, 3)]
    replies = AddressedGrid(grid, streamed=True).send_and_receive(asked, timeout=100.0)
    taken = []
    for client, _ in strategy.valid_replies(replies, "1"):
        strategy.report.metrics[client] = None  # type: ignore[assignment]
        taken.append(client)
    assert taken == [3, 0]
    assert strategy.report.surplus == [1]
    assert strategy.report.failed == []
    assert len(slept) == 3
    assert grid.order == [[FIRST_NODE + 1]]  # nobody asked for it


def test_a_stream_ends_with_the_last_reply_or_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    times = SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
    monkeypatch.setattr(nodes, "time", times)
    two = [train_message(FIRST_NODE + client) for client in range(2)]
    both = AddressedGrid(Nodes([[FIRST_NODE + 1], [FIRST_NODE]]), streamed=True).send_and_receive(two, timeout=50.0)
    assert [reply.metadata.src_node_id for reply in both] == [FIRST_NODE + 1, FIRST_NODE]
    one = AddressedGrid(Nodes([[FIRST_NODE + 1]]), streamed=True).send_and_receive(two, timeout=5.0)
    assert [reply.metadata.src_node_id for reply in one] == [FIRST_NODE + 1]


def test_over_sampling_is_refused_where_the_number_of_clients_is_drawn() -> None:
    """A sum that closes at a number changes by two clients where one more comes, which no accountant here covers."""
    content = override("server", {"over_sampling": 1.3, "sampling": "poisson", "fraction_train": 0.5})
    with pytest.raises(InputError, match=r"server\.over_sampling = 1\.3: needs a fixed number"):
        load_config(content)
    private = {**override("privacy", {"mode": "client", "noise_multiplier": 1.0, "target_delta": 1e-3})}
    with pytest.raises(InputError, match=r"server\.sampling = 'fixed': has no accountant"):
        load_config({**private, "server": RESERVES})


def test_over_sampling_is_refused_beside_a_strategy_of_the_users(runs: LlamaRuns) -> None:
    with pytest.raises(InputError, match=r"server\.over_sampling = 1\.5: has no use beside FedAvg"):
        runs.run(server=RESERVES, strategy=FedAvg)
