"""Replies of clients that are broken or hostile: each is its client's failure, and the mean is that of the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlora.communication.broadcast import Broadcast
from fedlora.communication.meter import MeteredGrid
from fedlora.communication.parts import INITIAL, Parts
from fedlora.communication.wire import decode, encode
from fedlora.errors import ClientErrorCode
from fedlora.flower import set_source
from fedlora.strategies.aggregation import WeightedMean
from fedlora.strategies.base import FederatedStrategy
from fedlora.strategies.replies import MOST_EXAMPLES
from tests.messages import FIRST_NODE, FakeGrid, error_reply, random_record
from tests.strategies.test_strategies import ARRAYS, strategy

CULPRIT = 0
"""The first client: what it sends would decide what the others are compared with."""

EXAMPLES = {0: 3, 1: 5, 2: 7, 3: 11}
SHAPES = {name: tuple(array.shape) for name, array in ARRAYS.items()}
HEAD = "classifier.bias"

Change = Callable[[RecordDict], Any]


def honest(client: int, dtype: torch.dtype = torch.float32) -> RecordDict:
    """A client's own arrays, and what a private client says."""
    generator = torch.Generator().manual_seed(client)
    arrays = {name: torch.randn(array.shape, generator=generator) for name, array in ARRAYS.items()}
    metrics = {"num-examples": EXAMPLES[client], "steps": 2, "loss": 0.5, "seconds": 0.1, "worker": 7.0}
    spent = {"noise-multiplier": 1.5, "sample-rate": 0.1, "total-steps": 2, "epsilon": 0.7, "delta": 1e-5}
    return RecordDict({"arrays": encode(arrays, dtype), "metrics": MetricRecord({**metrics, **spent})})


def made(**overrides: Any) -> FederatedStrategy:
    rounds = strategy(**overrides)
    rounds.examples = dict(EXAMPLES)
    return rounds


def mean(rounds: FederatedStrategy, change: Change | None, wire: torch.dtype = torch.float32) -> ArrayRecord | None:
    """Run a round through all that stands around the wire; the culprit's reply is changed, or does not come."""

    def answer(message: Message) -> Message | None:
        client = message.metadata.dst_node_id - FIRST_NODE
        content = honest(client, wire)
        if client != CULPRIT:
            return Message(content, reply_to=message)
        if change is None:
            return None
        changed = change(content)
        reply = changed if isinstance(changed, Message) else Message(content, reply_to=message)
        return reply

    clients = {FIRST_NODE + client: client for client in range(4)}
    parts = Parts("run")
    parts.set(INITIAL, {"frozen": torch.ones(2)}, 0)
    grid = Broadcast(MeteredGrid(FakeGrid(answer, 4), lambda *about: 0, clients), parts, clients, wire)
    messages = list(rounds.configure_train(1, encode(ARRAYS, wire), ConfigRecord(), grid))
    record, _ = rounds.aggregate_train(1, grid.send_and_receive(messages))
    return record


def put(name: str, array: Any) -> Change:
    return lambda content: content["arrays"].__setitem__(name, array)


def header(text: bytes, numbers: bytes = b"\0" * 12) -> Array:
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + numbers
    return Array("float32", (3,), "numpy.ndarray", data)


def metric(name: str, value: Any) -> Change:
    # As the bytes of a message hold it: a record's own check is on the client's side.
    return lambda content: content["metrics"].__dict__["_data"].__setitem__(name, value)


def reply_of(content: RecordDict, array: np.ndarray) -> None:
    content["arrays"][HEAD] = Array(array)


WRONG: dict[str, Change] = {
    "an unbalanced header": put(HEAD, header(b"{'descr': '<f4', 'shape': (3,), ")),
    "a header that asks for memory": put(
        HEAD, header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }")
    ),
    "a pickle": put(
        HEAD, header(b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", b"\x80\x04cos\nabort\n)R.")
    ),
    "no bytes": put(HEAD, Array("float32", (3,), "numpy.ndarray", b"")),
    "another kind of bytes": put(HEAD, Array("float32", (3,), "torch", b"abc")),
    "a dtype that is none": put(HEAD, Array("\x1b[2J", (3,), "numpy.ndarray", b"abc")),
    "a shape that is none": put(HEAD, Array("float32", (-3, 10**30), "numpy.ndarray", b"abc")),
    "float64, infinite in float32": lambda content: reply_of(content, np.full(3, 1e300)),
    "float64": lambda content: reply_of(content, np.ones(3)),
    "float16": lambda content: reply_of(content, np.ones(3, np.float16)),
    "all in float16": lambda content: content.__setitem__("arrays", random_record(SHAPES, np.float16)),
    "all in float64": lambda content: content.__setitem__("arrays", random_record(SHAPES, np.float64)),
    "integers": lambda content: reply_of(content, np.ones(3, np.int32)),
    "other bytes' order": lambda content: reply_of(content, np.ones(3, ">f4")),
    "nan": lambda content: reply_of(content, np.array([1, np.nan, 2], np.float32)),
    "infinity": lambda content: reply_of(content, np.array([1, 2, -np.inf], np.float32)),
    "an array more": put("extra", Array(np.ones(3, np.float32))),
    "an array less": lambda content: content["arrays"].pop(HEAD),
    "another name": lambda content: content["arrays"].__setitem__("\x1b[2J", content["arrays"].pop(HEAD)),
    "another shape": lambda content: reply_of(content, np.ones((1, 3), np.float32)),
    "no arrays": lambda content: content.pop("arrays"),
    "two records of arrays": lambda content: content.__setitem__("more", encode({})),
    "no metrics": lambda content: content.pop("metrics"),
    "metrics that are none": lambda content: content.__setitem__("metrics", ConfigRecord({"num-examples": 3})),
    "nothing": lambda content: content.clear(),
    **{
        f"num-examples = {value}": metric("num-examples", value)
        for value in ("9", b"9", True, [9], 9.0, -1, math.nan, math.inf, 1.7e308, 1e9, MOST_EXAMPLES + 1, 2**62, None)
    },
}
PRIVATE: dict[str, Change] = {
    f"{name} = {value}": metric(name, value)
    for name, values in {
        "epsilon": (-1.0, math.nan, math.inf, [1.0], True, "1", None),
        "delta": (-1e-5, 1.0, math.nan, "0"),
        "noise-multiplier": (-1.0, math.inf, math.nan, []),
        "sample-rate": (0.0, 1.5, math.nan, [0.1]),
        "steps": (-1, 1.5, 2**62, True, [2], None),
        "total-steps": (-1, math.nan, [2]),
    }.items()
    for value in values
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_reply_that_is_wrong_is_its_clients_failure_and_changes_no_bit_of_the_mean(wrong: str) -> None:
    rounds = made()
    record = mean(rounds, WRONG[wrong])
    ((failure),) = rounds.report.failed
    assert (failure["client"], failure["code"]) == (CULPRIT, ClientErrorCode.REPLY)
    assert failure["error"].startswith("the reply is refused: ")
    assert failure["error"].isprintable()
    assert len(failure["error"]) < 300
    assert record == mean(made(), None)
    assert sorted(rounds.report.metrics) == [1, 2, 3]


@pytest.mark.parametrize("wrong", PRIVATE)
def test_in_a_private_run_what_was_spent_must_be_said(wrong: str) -> None:
    private = {"privacy__mode": "example", "privacy__noise_multiplier": 1.5}
    rounds = made(**private)
    record = mean(rounds, PRIVATE[wrong])
    ((failure),) = rounds.report.failed
    assert failure["error"].startswith(f"the reply is refused: {wrong.partition(' ')[0]}") or "steps" in wrong
    assert record == mean(made(**private), None)
    # And is nobody's concern in another run.
    rounds = made()
    mean(rounds, metric("epsilon", 9.0))
    assert rounds.report.failed == []
    assert not any("epsilon" in row for row in rounds.report.metrics.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num-examples", MOST_EXAMPLES),
        *((n, v) for n in ("loss", "seconds", "worker") for v in (math.nan, [1.0], -math.inf)),
    ],
)
def test_nothing_but_a_display_hangs_on_the_other_metrics(name: str, value: Any) -> None:
    """The weight is what the client described itself with, before it knew what it would send."""
    rounds = made()
    assert mean(rounds, metric(name, value)) == mean(made(), lambda content: None)
    assert rounds.report.failed == []
    row = rounds.report.metrics[CULPRIT]
    assert all(isinstance(number, int | float) for number in row.values())
    assert "seconds" not in row or row["seconds"] >= 0  # type: ignore[operator]


@given(st.binary(max_size=80), st.integers(0, 160), st.sampled_from(sorted(ARRAYS)))
def test_bytes_that_a_client_damages_count_for_it_or_not_at_all(rest: bytes, at: int, name: str) -> None:
    def damage(content: RecordDict) -> None:
        array = content["arrays"][name]  # type: ignore[index]
        array.data = array.data[:at] + rest + array.data[at + len(rest) :]

    rounds = made()
    record = mean(rounds, damage)
    assert record is not None
    if rounds.report.failed:
        assert record == mean(made(), None)
    else:
        assert all(array.isfinite().all() for array in decode(record).values())
        assert len(rounds.report.metrics) == 4


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5),
    st.lists(st.integers() | st.floats(), max_size=3),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([*honest(0)["metrics"], "other"]), values))
def test_metrics_of_any_kind_never_end_a_round(drawn: dict[str, Any]) -> None:
    def change(content: RecordDict) -> None:
        for name, value in drawn.items():
            metric(name, value)(content)

    for private in (False, True):
        rounds = made(**{"privacy__mode": "example", "privacy__noise_multiplier": 1.5} if private else {})
        record = mean(rounds, change)
        answered = CULPRIT in rounds.report.metrics
        assert record == mean(made(), (lambda content: None) if answered else None)


@pytest.mark.parametrize("metered", [True, False])
def test_only_the_first_reply_of_a_client_that_was_asked_counts(
    metered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rounds = made()
    messages = list(rounds.configure_train(1, encode(ARRAYS), ConfigRecord(), FakeGrid(lambda m: None, 4)))
    replies = [Message(honest(client), reply_to=message) for client, message in enumerate(messages)]
    again, stranger, stale, error = (Message(honest(3), reply_to=messages[i]) for i in (0, 1, 2, 0))
    set_source(stranger, 666)
    stale.metadata.group_id = "0"
    sent = [stale, stranger, replies[1], replies[0], again, error_reply(messages[0], 102, "late"), replies[2], again]
    record, _ = rounds.aggregate_train(1, [*sent, replies[3], again, error])
    assert record == mean(made(), lambda content: None)
    assert rounds.report.failed == []
    told = [r.getMessage() for r in caplog.records]
    assert sum("client 0 answered twice" in line for line in told) == 5
    assert sum("node 666 answered without being asked" in line for line in told) == 1
    assert sum("client 2 answered to round '0', in round 1" in line for line in told) == 1


def test_a_client_whose_only_reply_is_to_another_round_did_not_answer() -> None:
    def stale(content: RecordDict) -> Message:
        message = Message(RecordDict(), FIRST_NODE + CULPRIT, "train", group_id="\x1b[2J")
        return Message(content, reply_to=message)

    rounds = made()
    assert mean(rounds, stale) == mean(made(), None)
    assert [(f["client"], f["code"]) for f in rounds.report.failed] == [(CULPRIT, 0)]


def test_a_client_that_forgets_the_frozen_arrays_again_and_again_is_asked_twice() -> None:
    asked = 0

    def forget(content: RecordDict) -> Message:
        nonlocal asked
        asked += 1
        message = Message(RecordDict(), FIRST_NODE + CULPRIT, "train", group_id="1")
        return error_reply(message, ClientErrorCode.NEEDS_INITIAL, "NeedsInitialError")

    rounds = made()
    assert mean(rounds, forget) == mean(made(), None)
    assert asked == 2
    assert [f["code"] for f in rounds.report.failed] == [ClientErrorCode.NEEDS_INITIAL]


def test_numbers_whose_sum_would_not_be_finite_are_refused() -> None:
    """In float64 the largest number, times a weight, is infinite: the client would keep every round from counting."""
    rounds = made(model__dtype="float64")

    def largest(content: RecordDict) -> None:
        reply_of(content, np.full(3, 1e308))

    record = mean(rounds, largest, torch.float64)
    assert [failure["error"] for failure in rounds.report.failed] == [f"the reply is refused: {HEAD} is not finite"]
    assert record == mean(made(model__dtype="float64"), None, torch.float64)


def test_large_moves_have_no_drift_and_do_not_end_the_run() -> None:
    for dtype, value in (("float64", 1e200), ("float32", 3e38)):
        wire = getattr(torch, dtype)
        rounds = made(model__dtype=dtype)
        record = mean(rounds, lambda c, v=value, w=wire: reply_of(c, torch.full((3,), v, dtype=w).numpy()), wire)
        assert rounds.report.failed == []
        assert record is not None
        assert rounds.report.drift is None


def test_a_round_whose_mean_is_not_finite_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightedMean, "result", lambda self: {"all": torch.full((11,), math.inf)})
    rounds = made()
    assert mean(rounds, lambda content: None) is None
    assert rounds.report.uncounted == "the aggregate is not finite"
    assert rounds.report.drift is None
