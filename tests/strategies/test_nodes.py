"""Who takes part: nodes by name, those that refuse, those that go away and come back; no SuperLink."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedlora.config import Config, load_config
from fedlora.errors import ClientErrorCode, InputError, RefusedError, RunError
from fedlora.flower import NodeInfo, set_message_id, set_source
from fedlora.node.names import NODE_RECORD, labels_digest
from fedlora.strategies.base import RoundReport, get_strategy
from fedlora.strategies.nodes import AddressedGrid, Roster, in_round
from tests.messages import FIRST_NODE, FakeGrid, error_reply, train_message

LABELS = ["bad", "good"]


def config(**overrides: Any) -> Config:
    base = {
        "model": {"name": "asset:minilm-l6"},
        "data": {"name": "nodes", "test": "test.csv"},
        "method": {"name": "fed-sb"},
        "server": {"timeout": 0.2},
    }
    return load_config(base, {key.replace("__", "."): value for key, value in overrides.items()})


class Nodes(FakeGrid):
    """Nodes that answer to their names; ``names`` is node id to name, ``online`` who has a lease."""

    def __init__(self, names: dict[int, str], answers: dict[int, Error] | None = None) -> None:
        super().__init__(self._answer)
        self.names, self.answers = names, answers or {}
        self.registered: dict[int, str] = {}
        self.online = set(names)
        self.alive = set(names)
        self.pushed: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.online, reverse=True)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.registered.get(node, "")) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            key = f"query-{len(self.pushed)}"
            set_message_id(message, key)
            self.pushed[key] = message
            ids.append(key)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [r for i in message_ids if i in self.pushed and (r := self._answer(self.pushed[i])) is not None]

    def _answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        if node not in self.alive:
            return None
        if node in self.answers:
            return Message(self.answers[node], reply_to=message)
        about: Any = message.content[NODE_RECORD]
        record = ConfigRecord({"name": self.names[node], "labels": labels_digest(list(about["label-names"]))})
        return Message(
            RecordDict({"metrics": MetricRecord({"num-examples": 9}), NODE_RECORD: record}), reply_to=message
        )


def roster(grid: Nodes, names: Iterable[str] = (), **overrides: Any) -> Roster:
    made = Roster(grid, config(**overrides), LABELS, "f1", list(names))
    made.discover()
    return made


@pytest.fixture
def three() -> Nodes:
    return Nodes({7: "north", 5: "south", 9: "east"})


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.strategies.nodes._POLL_SECONDS", 0.01)


def test_nodes_that_lost_their_connection_are_asked_again_until_the_timeout(three: Nodes) -> None:
    asked = []

    def answer(message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        asked.append(node)
        if node != 5 and asked.count(node) <= 2:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)
        return Nodes._answer(three, message)

    three.answer = answer
    made = roster(three, data__partition__clients=3, server__timeout=5.0)
    assert made.names == ["east", "north", "south"]
    assert sorted(asked) == [5, 7, 7, 7, 9, 9, 9]


def test_clients_are_numbered_by_name(three: Nodes) -> None:
    found = roster(three)
    assert found.names == ["east", "north", "south"]
    assert found.nodes == {0: 9, 1: 7, 2: 5}
    assert found.real
    (queries,) = three.sent
    about: Any = queries[0].content[NODE_RECORD]
    assert (about["federation"], list(about["label-names"])) == ("f1", LABELS)


def test_a_resumed_run_keeps_the_numbers(three: Nodes) -> None:
    three.online.remove(9)
    found = roster(three, names=["south", "west", "north"])
    assert found.nodes == {0: 5, 2: 7}
    assert found.names == ["south", "west", "north"]


def test_a_node_that_does_not_answer_in_a_round_is_not_asked_until_it_is_back(three: Nodes) -> None:
    found = roster(three)
    three.alive.remove(7)
    failed = [{"client": 1, "code": 0, "error": "no reply within the timeout"}]
    found.after_round(RoundReport(clients=[0, 1, 2], failed=failed))
    assert found.present() == {0: 9, 2: 5}
    # Its lease still holds: it is asked in passing, once, and nobody waits for it.
    for _ in range(3):
        found.refresh()
    assert found.present() == {0: 9, 2: 5}
    assert len(three.pushed) == 1
    three.alive.add(7)
    found.refresh()
    assert found.present() == found.nodes == {0: 9, 1: 7, 2: 5}


def test_a_node_whose_lease_ended_is_away_and_comes_back_under_its_number(three: Nodes) -> None:
    found = roster(three)
    three.online.remove(9)
    found.refresh()
    assert found.present() == {1: 7, 2: 5}
    # It was registered anew, with another key: the name counts.
    three.online.add(11)
    three.alive.add(11)
    three.names[11] = "east"
    found.refresh()
    found.refresh()
    assert found.present() == {0: 11, 1: 7, 2: 5}


def test_a_new_node_joins_behind_the_others(three: Nodes) -> None:
    found = roster(three)
    three.online.add(11)
    three.alive.add(11)
    three.names[11] = "alps"
    found.refresh()
    found.refresh()
    assert found.names == ["east", "north", "south", "alps"]
    assert found.clients()[11] == 3


def test_an_error_of_its_own_does_not_send_a_node_away(three: Nodes) -> None:
    found = roster(three)
    failed = [{"client": c, "code": ClientErrorCode.FAILED, "error": "KeyError"} for c in range(3)]
    found.after_round(RoundReport(clients=[0, 1, 2], failed=failed))
    assert found.away == set()


def test_too_few_are_waited_for_and_then_named(three: Nodes) -> None:
    found = roster(three, server__min_replies=3)
    three.online.remove(9)
    with pytest.raises(RunError, match=r"2 nodes are online.*away: east"):
        found.refresh()


def test_a_run_waits_for_as_many_nodes_as_the_config_says(three: Nodes) -> None:
    late = iter([{7}, {7, 5}, {7, 5, 9}])

    def appear() -> Iterable[int]:
        three.online = next(late, three.online)
        return sorted(three.online)

    three.get_node_ids = appear  # type: ignore[method-assign]
    assert roster(three, data__partition={"clients": 3}, server__timeout=30.0).nodes == {0: 9, 1: 7, 2: 5}


@pytest.mark.parametrize("name", ["north", "NORTH"])
def test_two_nodes_of_one_name_are_refused_and_the_others_go_on(three: Nodes, name: str) -> None:
    three.names[5] = name
    assert roster(three).nodes == {0: 9}
    with pytest.raises(RefusedError, match=f"two nodes call themselves {name}; give each node a name of its own"):
        roster(three, server__min_replies=2)


@pytest.mark.parametrize("online", [True, False])
def test_nobody_takes_the_name_of_a_node_that_the_server_let_in(three: Nodes, online: bool) -> None:
    three.registered = {7: "north", 5: "mallory", 9: "east"}
    three.names[5] = "north"
    assert roster(three).nodes == {0: 9, 1: 7}
    # Nor while that one is away.
    three.names[5] = "south"
    three.registered[5] = "south"
    found = roster(three)
    assert found.names == ["east", "north", "south"]
    three.online.remove(7)
    three.online.add(11)
    three.alive.add(11)
    three.names[11], three.registered[11] = "north", "mallory"
    for _ in range(3):
        found.refresh()
    assert found.present() == {0: 9, 2: 5}


def test_nobody_takes_the_name_of_a_node_that_is_there(three: Nodes) -> None:
    found = roster(three)
    three.online.add(11)
    three.alive.add(11)
    three.names[11] = "East"
    for _ in range(3):
        found.refresh()
    assert (found.names, found.present()) == (["east", "north", "south"], {0: 9, 1: 7, 2: 5})


NAMES = [
    "",
    "..",
    "a/b",
    "a\\b",
    "/etc",
    "\x1b[31mred",
    "a\nb",
    "a\n",
    " a",
    "-a",
    "ä",
    "a\0",
    "x" * 101,
    "a:b",
    "CON",
    "nul.x",
]


@pytest.mark.parametrize("name", [*NAMES, 3, True, 1.5, b"north", ["north"], None])
def test_a_node_whose_name_is_none_is_refused_by_its_number(
    three: Nodes, name: Any, caplog: pytest.LogCaptureFixture
) -> None:
    original = three._answer

    def answer(message: Message) -> Message | None:
        reply = original(message)
        assert reply is not None
        if reply.metadata.src_node_id == 7:
            about: Any = reply.content[NODE_RECORD]
            del about["name"]
            if name is not None:
                about["name"] = name
        return reply

    three.answer = answer
    assert roster(three).nodes == {0: 9, 1: 5}
    (told,) = [r.getMessage() for r in caplog.records if "its name is" in r.getMessage()]
    assert told.startswith("node 7 does not take part: its name is ")
    assert told.isprintable()
    assert len(told) < 250


LARGE = 10**9
COUNTS = [0, -1, 1.0, 9.5, float("nan"), float("inf"), LARGE, 2**70, 1.7e308, [9], None]


@pytest.mark.parametrize("count", COUNTS)
def test_a_node_that_says_no_number_of_examples_is_refused(three: Nodes, count: Any) -> None:
    original = three._answer

    def answer(message: Message) -> Message | None:
        reply = original(message)
        assert reply is not None
        if reply.metadata.src_node_id == 7:
            reply.content["metrics"] = MetricRecord({} if count is None else {"num-examples": count})
        return reply

    three.answer = answer
    found = roster(three)
    assert found.nodes == {0: 9, 1: 5}
    assert found.examples == {0: 9, 1: 9}
    with pytest.raises(RefusedError, match="node 7 does not take part: num-examples is"):
        roster(three, server__min_replies=3)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"metrics": MetricRecord({"num-examples": 9})}),
        RecordDict({"metrics": MetricRecord({"num-examples": 9, "partition-id": 0})}),
        RecordDict({"metrics": ConfigRecord({"num-examples": 9}), NODE_RECORD: ConfigRecord({"name": "north"})}),
        RecordDict({"metrics": MetricRecord({"num-examples": 9}), NODE_RECORD: MetricRecord({"name": 3})}),
        RecordDict({"metrics": MetricRecord({"num-examples": 9}), NODE_RECORD: ConfigRecord({"name": "north"})}),
        RecordDict(
            {
                "metrics": MetricRecord({"num-examples": 9}),
                NODE_RECORD: ConfigRecord({"name": "north", "labels": [1, 2]}),
            }
        ),
    ],
)
def test_a_node_that_describes_nothing_does_not_end_the_run(three: Nodes, content: RecordDict) -> None:
    original = three._answer
    three.answer = lambda m: Message(content, reply_to=m) if m.metadata.dst_node_id == 7 else original(m)
    assert roster(three).nodes == {0: 9, 1: 5}


def test_who_was_not_asked_is_not_heard(three: Nodes) -> None:
    original = three._answer

    def answer(message: Message) -> Message | None:
        reply = original(message)
        assert reply is not None
        if reply.metadata.src_node_id == 7:
            set_source(reply, 666)
        return reply

    three.answer = answer
    assert roster(three).nodes == {0: 9, 1: 5}


def test_a_node_cannot_write_to_the_servers_terminal(three: Nodes) -> None:
    three.answers[7] = Error(code=101, reason="\x1b]0;owned\x07" + "y" * 10**5)
    with pytest.raises(RunError) as error:
        roster(three, server__min_replies=3)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("code", "reason", "kind", "parts"),
    [
        (
            ClientErrorCode.POLICY,
            "PolicyError: min_noise_multiplier = 2.0",
            InputError,
            ["privacy.target_epsilon = 3.0", "node 7 refuses (PolicyError, code 107)", "min_noise_multiplier = 2.0"],
        ),
        (ClientErrorCode.POLICY, "PolicyError: allow_non_private = false", InputError, ["privacy.mode", "'none'"]),
        (
            ClientErrorCode.POLICY,
            "PolicyError: models = 0",
            InputError,
            ["model.name = ", "node 7 refuses (PolicyError, code 107)", "[policy] models"],
        ),
        (
            ClientErrorCode.POLICY,
            "PolicyError: max_describes_per_day = 100",
            RefusedError,
            ["node 7 refuses", "max_describes_per_day = 100", "try again tomorrow"],
        ),
        (ClientErrorCode.LABELS, "LabelError", InputError, ["data.label_names", "node 7", "LabelError", "109"]),
        (
            ClientErrorCode.BUDGET,
            "BudgetError: epsilon left = 0.25",
            RefusedError,
            ["node 7 refuses (BudgetError, code 103)", "epsilon left = 0.25", "lower privacy.target_epsilon"],
        ),
        (ClientErrorCode.INPUT, "InputError", RefusedError, ["node 7", "its own log"]),
        (ClientErrorCode.WORKER_DIED, "WorkerDiedError", RefusedError, ["node 7 failed", "WorkerDiedError"]),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(
    three: Nodes, code: int, reason: str, kind: type[Exception], parts: list[str]
) -> None:
    three.answers[7] = Error(code=code, reason=reason)
    privacy = {"privacy__mode": "example", "privacy__target_epsilon": 3.0} if "noise" in reason else {}
    # The others are enough, unless the config asks for all.
    assert roster(three, **privacy).nodes == {0: 9, 1: 5}
    with pytest.raises(kind) as error:
        roster(three, server__min_replies=3, **privacy)
    for part in parts:
        assert part in str(error.value)


def test_a_refusal_names_the_node_as_the_server_knows_it_and_who_else_refuses(three: Nodes) -> None:
    three.registered = {7: "north", 5: "south", 9: "east"}
    spent = Error(code=ClientErrorCode.BUDGET, reason="BudgetError: epsilon left = 0")
    three.answers = {7: spent, 5: spent}
    with pytest.raises(RefusedError, match=r"^north refuses .*; south refused as well$"):
        roster(three, server__min_replies=2)


def test_a_node_that_refuses_in_a_round_is_not_asked_again_and_nobody_waits_for_it(three: Nodes) -> None:
    found = roster(three, server__timeout=60.0, server__min_replies=2)
    said = found.told(7, ClientErrorCode.BUDGET, "BudgetError: epsilon left = 0.1")
    assert said.startswith("north refuses (BudgetError, code 103): epsilon left = 0.1 does not cover a round")
    # What the SuperLink answers in a node's place stays as it is.
    assert found.told(7, ErrorCode.NODE_UNAVAILABLE, "Error: Node Unavailable") == "Error: Node Unavailable"
    refused = {"client": 1, "code": ClientErrorCode.BUDGET, "error": said}
    found.after_round(RoundReport(clients=[0, 1, 2], failed=[refused]))
    found.refresh()
    assert found.present() == {0: 9, 2: 5}
    assert three.pushed == {}
    found.after_round(RoundReport(clients=[0, 2], failed=[{**refused, "client": 0}]))
    began = time.monotonic()
    with pytest.raises(RefusedError, match="north refuses"):
        found.refresh()
    assert time.monotonic() - began < 5


def test_a_node_that_means_other_classes_is_refused(three: Nodes) -> None:
    made = Roster(three, config(), LABELS, "f1")
    made.label_names = ["bad", "good"]
    three.names = {7: "north"}
    three.online = {7}
    original = three._answer

    def lie(message: Message) -> Message | None:
        reply = original(message)
        assert reply is not None
        reply.content[NODE_RECORD]["labels"] = labels_digest(["good", "bad"])  # type: ignore[index]
        return reply

    three.answer = lie
    with pytest.raises(InputError, match=r"data\.label_names"):
        made.discover()


def test_a_node_that_the_method_cannot_have_is_refused_by_name(three: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    """At the start as later; the others keep their numbers, and the run goes on."""

    def refuses(client: int, name: str) -> InputError | None:
        return InputError("method.ranks", [4], f"has no rank for node {name}") if client > 0 else None

    three.online = {5, 7}
    made = Roster(three, config(), LABELS, "f1", refuses=refuses)
    made.discover()
    assert (made.names, made.nodes) == (["north"], {0: 7})
    three.online.add(9)
    for _ in range(3):
        made.refresh()
    assert (made.names, made.present()) == (["north"], {0: 7})
    told = [record.getMessage() for record in caplog.records if "has no rank" in record.getMessage()]
    assert [line.rpartition(" ")[2] for line in told] == ["south", "east"]  # each once
    with pytest.raises(InputError, match="has no rank for node east"):
        Roster(three, config(server__min_replies=2), LABELS, "f1", ["north", "west"], refuses).discover()


@pytest.mark.parametrize("at_once", [2, 4096])
def test_simulated_clients_keep_their_partitions(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("fedlora.strategies.nodes._AT_ONCE", at_once)

    def answer(message: Message) -> Message:
        client = 2 - (message.metadata.dst_node_id - FIRST_NODE)
        return Message(RecordDict({"metrics": MetricRecord({"partition-id": client})}), reply_to=message)

    grid = FakeGrid(answer)
    made = Roster(grid, config(data__name="train.csv", data__partition={"clients": 3}), LABELS, "f1")
    made.discover()
    assert [len(messages) for messages in grid.sent] == ([2, 1] if at_once == 2 else [3])
    assert list(made.nodes.items()) == [(0, FIRST_NODE + 2), (1, FIRST_NODE + 1), (2, FIRST_NODE)]
    assert not made.real
    made.refresh()
    made.after_round(RoundReport(clients=[0], failed=[{"client": 0, "code": 0, "error": ""}]))
    assert made.present() == made.nodes


def test_messages_end_with_their_round_and_tell_a_node_who_it_is(three: Nodes) -> None:
    found = roster(three)
    content = RecordDict({"config": ConfigRecord({"server-round": 4})})
    first, second = in_round([train_message(9, content), train_message(5, content)], 4, found, seconds=0.2)
    assert (first.metadata.group_id, first.metadata.ttl) == ("4", 0.2)
    assert dict(first.content[NODE_RECORD]) == {"federation": "f1", "client": 0}  # type: ignore[call-overload]
    assert dict(second.content[NODE_RECORD]) == {"federation": "f1", "client": 2}  # type: ignore[call-overload]
    assert NODE_RECORD not in content


def test_an_error_that_the_superlink_answers_is_its_nodes(three: Nodes) -> None:
    class SuperLink(FakeGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
            for number, message in enumerate(messages):
                message.metadata.__dict__["_message_id"] = f"m{number}"
                reply = error_reply(message, ErrorCode.NODE_UNAVAILABLE, "Error: Node Unavailable")
                reply.metadata.__dict__["_src_node_id"] = 1
                yield reply

    grid = AddressedGrid(SuperLink(lambda message: None))
    replies = list(grid.send_and_receive([train_message(9), train_message(5)], timeout=1.0))
    assert [reply.metadata.src_node_id for reply in replies] == [9, 5]


@pytest.mark.parametrize("waits", [True, False])
def test_a_round_of_which_all_are_away_ends_a_simulation_alone(waits: bool) -> None:
    strategy = get_strategy("fed-sb")(config())
    strategy.nodes, strategy.waits = {0: 9, 1: 5}, waits
    strategy.report = RoundReport(clients=[0, 1])
    gone = error_reply(train_message(9), ErrorCode.NODE_UNAVAILABLE, "Error: Node Unavailable")
    gone.metadata.__dict__["_src_node_id"] = 9
    if waits:
        assert list(strategy.valid_replies([gone])) == []
        assert strategy.report.only_absent
        assert [failure["code"] for failure in strategy.report.failed] == [ErrorCode.NODE_UNAVAILABLE, 0]
    else:
        with pytest.raises(RunError):
            list(strategy.valid_replies([gone]))
