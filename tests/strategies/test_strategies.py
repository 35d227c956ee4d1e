"""What every method does with the replies of a round, without Ray and without a model."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlora.arrays import Arrays
from fedlora.communication.wire import decode, encode
from fedlora.config import Config, load_config
from fedlora.errors import ClientErrorCode, InputError, RunError
from fedlora.methods import methods
from fedlora.roles import HEAD, trained_kinds
from fedlora.strategies.aggregation import WeightedMean, in_client_order, weighted_mean
from fedlora.strategies.base import Contact, FederatedStrategy, Payload, Sizes, get_strategy
from fedlora.strategies.ranked import RankedStrategy
from tests.messages import FIRST_NODE, FakeGrid, error_reply, records, train_message

METHODS = methods()

Answer = Callable[[Message, int], Message | None]
ARRAYS = {"layer.lora_B": torch.zeros(4, 2), "classifier.bias": torch.zeros(3)}
MODEL: Any = SimpleNamespace(head_names=("classifier.bias",), names=lambda kinds: ())
"""All that a strategy asks of the model, where it gets the arrays."""


def config(method: str = "fedit", clients: int = 4, **overrides: Any) -> Config:
    base = {
        "model": {"name": "asset:minilm-l6"},
        "data": {"name": "asset:rotten-tomatoes", "partition": {"clients": clients}},
        "method": {"name": method},
    }
    return load_config(base, {key.replace("__", "."): value for key, value in overrides.items()})


def strategy(method: str = "fedit", clients: int = 4, **overrides: Any) -> FederatedStrategy:
    made = get_strategy(method)(config(method, clients, **overrides))
    made.know(MODEL)
    made.nodes = {client: FIRST_NODE + client for client in range(clients)}
    return made


def filled(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(array, value) for name, array in ARRAYS.items()}


def good(message: Message, client: int) -> Message:
    """Client i answers with arrays full of i, i + 1 examples and loss i."""
    return Message(records(filled(client), num_examples=client + 1, loss=float(client)), reply_to=message)


def run_round(
    rounds: FederatedStrategy,
    answer: Answer = good,
    server_round: int = 1,
    order: Sequence[int] | None = None,
    arrays: Arrays = ARRAYS,
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Ask the sampled clients and aggregate what they answer, in the order given."""
    messages = list(rounds.configure_train(server_round, encode(arrays), ConfigRecord(), FakeGrid(lambda m: None)))
    places = range(len(messages)) if order is None else order
    replies = (answer(messages[i], messages[i].metadata.dst_node_id - FIRST_NODE) for i in places)
    return rounds.aggregate_train(server_round, (reply for reply in replies if reply is not None))


def mean_of(clients: Sequence[int]) -> float:
    return sum(c * (c + 1) for c in clients) / sum(c + 1 for c in clients)


def only_value(record: ArrayRecord | None) -> float:
    """Return the one number that all arrays are full of."""
    assert record is not None
    values = torch.cat([array.flatten() for array in decode(record).values()])
    assert (values == values[0]).all()
    return float(values[0])


# Averaging.


MEANS = (FederatedStrategy.aggregate, RankedStrategy.aggregate)
AVERAGING = [name for name, method in METHODS.items() if method.aggregate in MEANS]
"""Not FlexMoRE, which averages nothing; tests/strategies/test_flexmore.py has what it does instead."""


def test_the_papers_methods_average() -> None:
    assert {"fedit", "ffa-lora", "fed-sb"} <= set(AVERAGING)


@pytest.mark.parametrize("method", AVERAGING)
def test_clients_weigh_by_their_examples(method: str) -> None:
    rounds = strategy(method)
    roles = rounds.roles(rounds.config, 1)
    arrays = {f"layer.{kind}": torch.zeros(4, 2) for kind, role in roles.items() if role.trained and kind != HEAD}
    arrays |= {"classifier.bias": torch.zeros(3)} if HEAD in roles else {}
    sent = {name: array for name, array in arrays.items() if roles[rounds.kind(name)].up != "never"}

    def answer(message: Message, client: int) -> Message:
        content = {name: torch.full_like(array, client) for name, array in sent.items()}
        return Message(records(content, num_examples=client + 1, loss=float(client)), reply_to=message)

    record, metrics = run_round(rounds, answer, arrays=arrays)
    assert record is not None
    assert list(record) == list(arrays)
    record = ArrayRecord({name: record[name] for name in sent})
    assert only_value(record) == pytest.approx(mean_of(range(4)))
    assert metrics is not None
    assert metrics["num-examples"] == 1 + 2 + 3 + 4
    assert metrics["loss"] == pytest.approx(mean_of(range(4)))
    assert rounds.report.clients == [0, 1, 2, 3]
    assert rounds.report.failed == []
    assert sorted(rounds.report.metrics) == [0, 1, 2, 3]


def test_clients_that_all_hold_no_examples_change_nothing() -> None:
    def answer(message: Message, client: int) -> Message:
        return Message(records(ARRAYS, num_examples=0, loss=1.0), reply_to=message)

    record, metrics = run_round(strategy(), answer)
    assert record is None
    assert metrics == MetricRecord({"num-examples": 0.0})


def test_a_loss_that_is_no_number_is_left_out() -> None:
    def answer(message: Message, client: int) -> Message:
        content = records(filled(client), num_examples=client + 1)
        content["metrics"]["loss"] = [1.0, 2.0] if client == 1 else 1.0  # type: ignore[index]
        return Message(content, reply_to=message)

    record, metrics = run_round(strategy(), answer)
    assert only_value(record) == pytest.approx(mean_of(range(4)))
    assert metrics == MetricRecord({"num-examples": 10.0})


@pytest.mark.parametrize(("dtype", "wire"), [("float32", "float32"), ("float64", "float64"), ("bfloat16", "float32")])
def test_the_aggregate_has_the_wires_dtype(dtype: str, wire: str) -> None:
    def answer(message: Message, client: int) -> Message:
        metrics = MetricRecord({"num-examples": client + 1})
        return Message(
            RecordDict({"arrays": encode(filled(client), getattr(torch, wire)), "metrics": metrics}), reply_to=message
        )

    rounds = strategy(model__dtype=dtype)
    record, _ = run_round(rounds, answer)
    assert rounds.report.failed == []
    assert record is not None
    assert only_value(record) == pytest.approx(mean_of(range(4)))
    assert {array.dtype for array in record.values()} == {wire}


@given(st.permutations(range(4)))
def test_the_order_of_arrival_changes_no_bit(order: list[int]) -> None:
    def answer(message: Message, client: int) -> Message:
        generator = torch.Generator().manual_seed(client)
        arrays = {name: torch.randn(a.shape, generator=generator) for name, a in ARRAYS.items()}
        return Message(records(arrays, num_examples=3 + client, loss=0.1 * client), reply_to=message)

    record, metrics = run_round(strategy(), answer, order=order)
    expected, expected_metrics = run_round(strategy(), answer)
    assert record == expected
    assert metrics == expected_metrics


@given(st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(0, 1000)), min_size=1, max_size=6))
def test_the_mean_is_that_of_numpy(clients: list[tuple[float, int]]) -> None:
    mean = weighted_mean([({"x": torch.tensor([value])}, weight) for value, weight in clients])
    values, weights = np.array([v for v, _ in clients]), np.array([w for _, w in clients])
    if weights.sum() == 0:
        assert mean is None
    else:
        assert mean is not None
        np.testing.assert_allclose(mean["x"].numpy(), np.average(values, weights=weights), rtol=1e-6, atol=1e-7)


def test_equal_arrays_average_to_themselves_to_the_bit() -> None:
    array = torch.randn(100, generator=torch.Generator().manual_seed(0))
    mean = weighted_mean([({"x": array}, weight) for weight in (3, 7, 11)])
    assert mean is not None
    assert torch.equal(mean["x"], array)


@pytest.mark.parametrize(
    "arrays", [{"x": torch.zeros(3)}, {"y": torch.zeros(2)}, {}, {"x": torch.zeros(2), "y": torch.zeros(2)}]
)
def test_arrays_that_do_not_fit_change_nothing(arrays: dict[str, torch.Tensor]) -> None:
    mean = WeightedMean()
    mean.add({"x": torch.ones(2)}, 1.0)
    with pytest.raises(ValueError, match=r"shape|names"):
        mean.add(arrays, 5.0)
    result = mean.result()
    assert result is not None
    assert torch.equal(result["x"], torch.ones(2))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        WeightedMean().add({"x": torch.ones(2)}, -1.0)


def test_the_mean_leaves_the_clients_arrays_alone() -> None:
    array = torch.ones(2)
    mean = WeightedMean()
    mean.add({"x": array}, 2.0)
    mean.add({"x": array}, 2.0)
    assert torch.equal(array, torch.ones(2))


# The order of replies.


@given(st.permutations(range(5)), st.sets(st.integers(0, 4)))
def test_replies_are_put_in_order_whatever_is_missing(order: list[int], missing: set[int]) -> None:
    nodes = [50, 7, 900, 3, 11]
    messages = [train_message(node) for node in nodes]
    replies = [Message(RecordDict(), reply_to=messages[i]) for i in order if i not in missing]
    ordered = [reply.metadata.src_node_id for reply in in_client_order(replies, nodes)]
    assert ordered == [node for i, node in enumerate(nodes) if i not in missing]


def test_a_reply_is_passed_on_as_soon_as_those_before_it_are_there() -> None:
    nodes = [1, 2, 3, 4]
    messages = {node: train_message(node) for node in nodes}
    asked: list[int] = []

    def replies() -> Iterator[Message]:
        for node in (2, 1, 4, 3):
            asked.append(node)
            yield Message(RecordDict(), reply_to=messages[node])

    ordered = in_client_order(replies(), nodes)
    assert next(ordered).metadata.src_node_id == 1
    assert asked == [2, 1]
    assert next(ordered).metadata.src_node_id == 2
    assert asked == [2, 1]
    assert [reply.metadata.src_node_id for reply in ordered] == [3, 4]


def test_replies_are_dropped_as_they_are_averaged() -> None:
    clients = 50
    rounds = strategy(clients=clients)
    alive: weakref.WeakSet[RecordDict] = weakref.WeakSet()
    most = 0

    class Content(RecordDict):
        __hash__ = object.__hash__

    def answer(message: Message, client: int) -> Message:
        nonlocal most
        most = max(most, len(alive))
        content = Content({"arrays": encode(filled(client)), "metrics": MetricRecord({"num-examples": 1})})
        alive.add(content)
        return Message(content, reply_to=message)

    record, _ = run_round(rounds, answer)
    assert only_value(record) == pytest.approx((clients - 1) / 2)
    assert most <= 3


# Failures.


def test_an_error_reply_counts_as_failed_and_the_others_are_averaged() -> None:
    rounds = strategy()
    seen: list[int] = []
    rounds.on_reply = seen.append

    def answer(message: Message, client: int) -> Message:
        return (
            error_reply(message, ClientErrorCode.FAILED, "Traceback: out of luck") if client == 2 else good(message, 2)
        )

    record, _ = run_round(rounds, answer)
    assert only_value(record) == 2.0
    assert rounds.report.failed == [{"client": 2, "code": 101, "error": "Traceback: out of luck"}]
    assert sorted(rounds.report.metrics) == [0, 1, 3]
    assert seen == [0, 1, 2, 3]


def test_a_missing_reply_counts_as_failed() -> None:
    rounds = strategy()
    record, _ = run_round(rounds, lambda message, client: None if client == 1 else good(message, client))
    assert only_value(record) == pytest.approx(mean_of([0, 2, 3]))
    ((failure),) = rounds.report.failed
    assert (failure["client"], failure["code"]) == (1, 0)
    assert "no reply" in failure["error"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_arrays_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    rounds = strategy()

    def answer(message: Message, client: int) -> Message:
        if client != 3:
            return good(message, client)
        arrays = filled(3)
        arrays["classifier.bias"][1] = bad
        return Message(records(arrays, num_examples=9), reply_to=message)

    record, _ = run_round(rounds, answer)
    assert only_value(record) == pytest.approx(mean_of([0, 1, 2]))
    ((failure),) = rounds.report.failed
    assert failure["client"] == 3
    assert "classifier.bias is not finite" in failure["error"]
    assert 3 not in rounds.report.metrics


def of_dtype(dtype: type) -> RecordDict:
    content = records(num_examples=5)
    content["arrays"] = ArrayRecord({name: Array(np.ones(a.shape).astype(dtype)) for name, a in ARRAYS.items()})
    return content


WRONG: dict[str, Callable[[], RecordDict]] = {
    "shape": lambda: records({**filled(0), "classifier.bias": torch.zeros(4)}, num_examples=5),
    "missing array": lambda: records({"classifier.bias": torch.zeros(3)}, num_examples=5),
    "unknown array": lambda: records({**filled(0), "extra": torch.zeros(1)}, num_examples=5),
    "negative weight": lambda: records(filled(0), num_examples=-5),
    "weight that is no number": lambda: records(filled(0), num_examples=float("nan")),
    "truth values": lambda: of_dtype(bool),
    "complex numbers": lambda: of_dtype(np.complex64),
    "text": lambda: of_dtype(str),
    "no arrays": lambda: RecordDict({"metrics": MetricRecord({"num-examples": 5})}),
    "no metrics": lambda: RecordDict({"arrays": encode(filled(0))}),
    "no number of examples": lambda: records(filled(0), loss=1.0),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_reply_that_does_not_fit_is_refused_and_the_others_are_averaged(wrong: str, culprit: int) -> None:
    rounds = strategy()

    def answer(message: Message, client: int) -> Message:
        return Message(WRONG[wrong](), reply_to=message) if client == culprit else good(message, client)

    record, _ = run_round(rounds, answer)
    others = [client for client in range(4) if client != culprit]
    assert only_value(record) == pytest.approx(mean_of(others))
    assert [failure["client"] for failure in rounds.report.failed] == [culprit]
    assert "refused" in rounds.report.failed[0]["error"]
    assert sorted(rounds.report.metrics) == others


def test_with_too_few_replies_the_arrays_stay() -> None:
    rounds = strategy(server__min_replies=3)
    record, _ = run_round(rounds, lambda m, c: good(m, c) if c < 2 else None)
    assert record is None
    record, _ = run_round(rounds, lambda m, c: good(m, c) if c < 3 else None)
    assert only_value(record) == pytest.approx(mean_of(range(3)))


def test_if_all_clients_fail_the_run_stops_and_tells_why() -> None:
    rounds = strategy()
    with pytest.raises(RunError, match=r"every client of the round failed.*out of memory"):
        run_round(rounds, lambda m, c: error_reply(m, ClientErrorCode.FAILED, "out of memory"))
    with pytest.raises(RunError, match="no reply"):
        run_round(rounds, lambda m, c: None)
    with pytest.raises(RunError, match="not finite"):
        run_round(rounds, lambda m, c: Message(records(filled(float("nan")), num_examples=1), reply_to=m))


@pytest.mark.parametrize("code", list(ClientErrorCode))
def test_whatever_a_client_says_went_wrong_is_its_own_failure(code: ClientErrorCode) -> None:
    rounds = strategy()
    record, _ = run_round(rounds, lambda m, c: error_reply(m, code, "lora_A did not move") if c == 1 else good(m, c))
    assert only_value(record) == pytest.approx(mean_of([0, 2, 3]))
    assert rounds.report.failed == [{"client": 1, "code": code, "error": "lora_A did not move"}]


def test_what_a_client_says_cannot_write_to_the_terminal() -> None:
    rounds = strategy()
    said = "\x1b[2J\x07done\n" + "x" * 10**6
    run_round(rounds, lambda m, c: error_reply(m, 101, said) if c == 1 else good(m, c))
    ((failure),) = rounds.report.failed
    assert failure["error"].startswith("\\x1b[2J\\x07done\n")
    assert len(failure["error"]) <= 20_000


def test_one_client_that_fails_alone_in_a_round_does_not_end_the_run() -> None:
    """Where a round asks one client, and it fails, another is asked in the next; two in a row are no accident."""
    rounds = strategy(server__fraction_train=0.25)
    asked = [rounds.sample(server_round) for server_round in range(1, 30)]
    bad = asked[0][0]
    second = next(i for i, clients in enumerate(asked) if clients != [bad])

    def answer(message: Message, client: int) -> Message:
        return error_reply(message, 101, "out of order") if client == bad else good(message, client)

    for server_round in range(1, second + 1):
        assert run_round(rounds, answer, server_round)[0] is None
        assert rounds.report.uncounted == "0 replies are fewer than server.min_replies = 1"
    assert run_round(rounds, answer, second + 1)[0] is not None
    for server_round in range(1, second + 1):
        assert run_round(rounds, answer, server_round)[0] is None
    with pytest.raises(RunError, match="every client of the round failed"):
        run_round(rounds, lambda m, c: error_reply(m, 101, "out of order"), second + 1)


def test_a_client_at_its_ceiling_is_a_failure_of_that_client_alone() -> None:
    rounds = strategy()
    run_round(
        rounds, lambda m, c: error_reply(m, ClientErrorCode.BUDGET, "above the ceiling") if c == 0 else good(m, c)
    )
    assert rounds.report.failed == [{"client": 0, "code": 103, "error": "above the ceiling"}]


def test_a_loss_that_is_no_number_does_not_spoil_the_mean() -> None:
    def answer(message: Message, client: int) -> Message:
        loss = float("nan") if client == 3 else 2.0
        return Message(records(filled(1), num_examples=5, loss=loss), reply_to=message)

    _, metrics = run_round(strategy(), answer)
    assert metrics is not None
    assert metrics["loss"] == 2.0


def test_replies_without_a_loss_have_no_mean_loss() -> None:
    _, metrics = run_round(strategy(), lambda m, c: Message(records(filled(1), num_examples=5), reply_to=m))
    assert metrics is not None
    assert "loss" not in metrics


# Sampling and addressing.


@given(st.integers(0, 2**62), st.integers(1, 99), st.floats(0.01, 1.0), st.integers(1, 30))
def test_the_sample_is_a_function_of_seed_round_and_number_of_clients(
    seed: int, server_round: int, fraction: float, clients: int
) -> None:
    first = strategy(clients=clients, run__seed=seed, server__fraction_train=fraction)
    second = strategy("fed-sb", clients, run__seed=seed, server__fraction_train=fraction)
    second.nodes = {client: 10**6 - 7 * client for client in reversed(range(clients))}
    chosen = first.sample(server_round)
    assert chosen == second.sample(server_round) == first.sample(server_round)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(clients))
    assert len(chosen) == max(1, round(fraction * clients))


def test_rounds_and_seeds_draw_differently_and_fairly() -> None:
    rounds = strategy(clients=20, server__fraction_train=0.25)
    draws = [tuple(rounds.sample(r)) for r in range(1, 201)]
    assert len(set(draws)) > 150
    counts = np.bincount(np.concatenate(draws), minlength=20)
    assert counts.min() > 25  # 50 are expected of each
    assert counts.max() < 80
    other = strategy(clients=20, server__fraction_train=0.25, run__seed=1)
    assert [tuple(other.sample(r)) for r in range(1, 201)] != draws


def test_messages_go_to_the_sampled_clients_and_share_one_content() -> None:
    rounds = strategy(clients=10, server__fraction_train=0.3, client__learning_rate=0.5)
    arrays = encode(ARRAYS)
    given_config = ConfigRecord({"parameterisation": "lora"})
    messages = list(rounds.configure_train(4, arrays, given_config, FakeGrid(lambda m: None)))
    assert [m.metadata.dst_node_id - FIRST_NODE for m in messages] == rounds.sample(4) == rounds.report.clients
    assert len(messages) == 3
    for message in messages:
        assert message.metadata.group_id == "4"
        assert message.metadata.message_type == "train"
        assert message.content["arrays"] is arrays
        assert dict(message.content["config"]) == {"parameterisation": "lora", "server-round": 4, "learning-rate": 0.5}
    assert dict(given_config) == {"parameterisation": "lora"}


def test_a_new_round_has_a_new_report() -> None:
    rounds = strategy()
    run_round(rounds, lambda m, c: None if c == 0 else good(m, c))
    run_round(rounds, server_round=2)
    assert rounds.report.failed == []


@pytest.mark.parametrize("method", AVERAGING)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_without_a_learning_rate_every_method_has_its_own(method: str, optimizer: str) -> None:
    rounds = strategy(method, client__optimizer=optimizer)
    (message, *_) = rounds.configure_train(1, encode(ARRAYS), ConfigRecord(), FakeGrid(lambda m: None))
    assert message.content["config"]["learning-rate"] == rounds.learning_rates[optimizer] > 0


def test_the_schedule_reaches_the_clients() -> None:
    rounds = strategy(client__learning_rate=1.0, client__lr_scheduler="linear", run__rounds=4)
    rates = [
        next(iter(rounds.configure_train(r, encode(ARRAYS), ConfigRecord(), FakeGrid(lambda m: None)))).content[
            "config"
        ]["learning-rate"]
        for r in range(1, 5)
    ]
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_without_nodes_the_grid_is_asked() -> None:
    rounds = get_strategy("fedit")(config())
    messages = list(rounds.configure_train(1, encode(ARRAYS), ConfigRecord(), FakeGrid(lambda m: None, 4)))
    assert [m.metadata.dst_node_id for m in messages] == [FIRST_NODE + i for i in range(4)]


def test_no_client_evaluates() -> None:
    rounds = strategy()
    assert list(rounds.configure_evaluate(1, encode(ARRAYS), ConfigRecord(), FakeGrid(lambda m: None))) == []
    assert rounds.aggregate_evaluate(1, []) is None


# The register.


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fills_in_the_form(method: str) -> None:
    cls = METHODS[method]
    assert cls.name == method
    assert cls.title
    assert re.fullmatch(r"arXiv \d{4}\.\d{5}|PEFT [\d.]+", cls.paper)
    assert cls.sends
    assert set(cls.learning_rates) == {"adamw", "sgd"}
    about = config(method, model__task="causal-lm", run__rounds=3)
    assert all(trained_kinds(cls.roles(about, server_round)) for server_round in (1, 2, 3))


CONTACTS = [Contact(1, 0, None, {}), Contact(3, 0, 2, {1: [0], 2: [0, 1]}), Contact(9, 3, None, {1: [0]})]


def test_payloads_are_those_of_the_papers() -> None:
    rank, head = 8, 770
    m, n = 384 + 128, 384 + 384
    sizes = Sizes([(384, 384), (128, 384)], rank, head)

    def payload(method: str) -> Payload:
        found = {strategy(method).payload(sizes, contact) for contact in CONTACTS}
        assert len(found) == 1  # whoever it is, and whatever was sent before
        return found.pop()

    fedit, ffa, sb = payload("fedit"), payload("ffa-lora"), payload("fed-sb")
    assert (fedit.initial, fedit.down, fedit.up) == (0, rank * (m + n) + head, rank * (m + n) + head)
    assert (ffa.initial, ffa.down, ffa.up) == (rank * n, rank * m + head, rank * m + head)
    assert (sb.initial, sb.down, sb.up) == (rank * (m + n), 2 * rank**2 + head, 2 * rank**2 + head)


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean fed-sb"):
        get_strategy("fedsb")
    with pytest.raises(InputError, match="choose one of") as caught:
        get_strategy("qqq")
    assert all(name in str(caught.value) for name in METHODS)
