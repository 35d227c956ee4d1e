"""The worker and the envelope, without Ray."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from hypothesis import given
from hypothesis import strategies as st

from fedlora.capacity import Capacity
from fedlora.errors import ClientErrorCode
from fedlora.flower import to_bytes
from fedlora.simulation import CohortClientApp
from fedlora.simulation.envelope import (
    LARGE,
    SharedRecord,
    StoredContext,
    pack,
    pack_record,
    unpack,
    unpack_record,
)
from fedlora.simulation.worker import Worker, load_app
from tests.messages import train_message
from tests.simulation import apps


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def context(client: int) -> Context:
    config = {"partition-id": client, "num-partitions": 4}
    return Context(run_id=1, node_id=2 + client, node_config=config, state=RecordDict(), run_config={})


@given(st.lists(st.integers(0, 6), max_size=3), st.sampled_from([np.float32, np.float64, np.int8]))
def test_a_message_is_the_same_after_the_journey(shape: list[int], dtype: type) -> None:
    record = ArrayRecord({"x": Array(np.ones(shape, dtype)), "y": Array(np.zeros(2, dtype))})
    content = RecordDict(
        {"a": record, "m": MetricRecord({"v": [1.5, 2.5]}), "c": ConfigRecord({"b": b"\0", "t": True})}
    )
    message = train_message(9, content, 4)
    message.metadata.__dict__["_message_id"] = "17"
    for travelled in (unpack(pack(message)), unpack(pickle.loads(pickle.dumps(pack(message), protocol=5)))):
        assert message_to_proto(travelled) == message_to_proto(message)
        assert list(travelled.content) == ["a", "m", "c"]
        assert travelled.metadata.message_id == "17"


def test_an_error_travels() -> None:
    reply = Message(Error(code=101, reason="why"), reply_to=train_message(3))
    travelled = unpack(pack(reply))
    assert travelled.error == reply.error
    assert not travelled.has_content()


def test_a_shared_record_travels_as_its_key() -> None:
    record = ArrayRecord({"x": Array(np.arange(1000.0))})
    message = train_message(3, RecordDict({"arrays": record, "again": record}))
    envelope = pack(message, {id(record): SharedRecord(5)})
    assert envelope.records == {"arrays": SharedRecord(5), "again": SharedRecord(5)}
    assert len(pickle.dumps(envelope)) < 1000
    content = unpack(envelope, {5: record}).content
    assert content["arrays"] is content["again"] is record


def test_large_arrays_are_viewed_and_small_ones_joined() -> None:
    names = {"s": 3, "l": LARGE // 8, "t": 5, "m": LARGE // 4}
    record = ArrayRecord({name: Array(np.arange(float(size))) for name, size in names.items()})
    packed = pack_record(record)
    assert [len(view) for view in packed.large] == [len(record[name].data) for name in ("l", "m")]
    for name, view in zip(("l", "m"), packed.large, strict=True):
        assert np.shares_memory(view, np.frombuffer(record[name].data, np.uint8))
    assert bytes(packed.small) == record["s"].data + record["t"].data
    assert unpack_record(packed) == record


def test_what_is_no_array_of_bytes_travels_as_it_is() -> None:
    record = ArrayRecord({"x": Array(np.arange(10.0))})
    record["x"].data = "text"  # type: ignore[assignment]
    assert unpack(pack(train_message(3, RecordDict({"arrays": record})))).content["arrays"] is record


def test_only_a_changed_state_is_stored_again() -> None:
    state = RecordDict({"count": ConfigRecord({"calls": 1})})
    stored = StoredContext(context(1), to_bytes(state))
    opened = stored.open()
    assert (opened.state, opened.node_config) == (state, context(1).node_config)
    assert stored.changed(opened) is None
    opened.state["count"]["calls"] = 2  # type: ignore[index]
    assert stored.changed(opened) == to_bytes(opened.state)
    assert stored.changed(stored.open()) is None
    assert StoredContext(context(1), b"").changed(context(1)) is None


def test_an_app_is_given_itself_or_by_its_place() -> None:
    assert load_app(apps.plain) is apps.plain
    assert load_app("tests.simulation.apps:cohort") is apps.cohort


def test_a_cohort_that_answers_too_little_is_run_one_by_one() -> None:
    worker = Worker(apps.short, 1)
    contexts = [context(i) for i in range(3)]
    envelopes = [pack(train_message(2 + i)) for i in range(3)]
    replies, states, _ = worker.handle(envelopes, contexts, {}, len(envelopes))
    assert [unpack(r).content["metrics"]["cohort"] for r in replies] == [1, 1, 1]
    assert [state["count"]["calls"] for state in states] == [1, 1, 1]


def test_a_cohort_that_is_run_one_by_one_says_why() -> None:
    worker = Worker(apps.short, 1)
    envelopes = [pack(train_message(2 + i)) for i in range(3)]
    replies, _, _ = worker.handle(envelopes, [context(i) for i in range(3)], {}, len(envelopes))
    (note,) = [note for reply in replies for note in reply.notes]
    assert note.startswith(
        "clients are trained one at a time, since a pass of several failed (TypeError: the ClientApp"
    )
    alone, _, _ = worker.handle(envelopes[:1], [context(0)], {}, 1)
    assert not alone[0].notes
    assert not logging.getLogger("fedlora").handlers


def test_a_cohort_that_fails_on_its_way_is_finished_one_by_one() -> None:
    worker = Worker(apps.streaming, 1)
    contexts = [context(i) for i in range(4)]
    content = RecordDict({"do": ConfigRecord({"raise-2": True})})
    replies = list(worker.run([train_message(2 + i, content) for i in range(4)], contexts))
    assert [reply.has_error() for reply in replies] == [False, False, True, False]
    assert [replies[i].content["metrics"]["cohort"] for i in (0, 1, 3)] == [4, 4, 1]
    assert ["count" in c.state and c.state["count"]["calls"] for c in contexts] == [1, 1, False, 1]


def test_a_batch_is_answered_in_parts() -> None:
    worker = Worker(apps.streaming, 1)
    contexts = [context(i) for i in range(5)]
    parts = [
        worker.handle([pack(train_message(2 + i)) for i in range(5)], contexts, {}, 2),
        worker.more(2),
        worker.more(2),
    ]
    assert [[unpack(r).content["metrics"]["client"] for r in replies] for replies, _, _ in parts] == [
        [0, 1],
        [2, 3],
        [4],
    ]
    assert worker.more(2)[0] == []


def test_a_failure_leaves_the_state_as_it_was() -> None:
    worker = Worker(apps.plain, 1)
    before = context(1)
    before.state["count"] = MetricRecord({"calls": 7})
    message = train_message(3, RecordDict({"do": ConfigRecord({"raise-1": True})}))
    (reply,), (state,), _ = worker.handle([pack(message)], [before], {}, 1)
    assert unpack(reply).error.code == ClientErrorCode.FAILED
    assert state["count"]["calls"] == 7


def test_the_number_of_threads_is_set() -> None:
    Worker(apps.plain, 1)
    assert torch.get_num_threads() == 1


def test_a_cohort_beyond_the_memory_is_halved_until_it_fits() -> None:
    worker = Worker(apps.small_memory, 1)
    contexts = [context(i) for i in range(7)]
    envelopes = [pack(train_message(2 + i)) for i in range(7)]
    replies, states, allowed = worker.handle(envelopes, contexts, {}, len(envelopes))
    assert [unpack(r).content["metrics"]["client"] for r in replies] == list(range(7))
    assert max(unpack(r).content["metrics"]["cohort"] for r in replies) <= apps.ROOM
    assert [state["count"]["calls"] for state in states] == [1] * 7
    assert 1 <= allowed.clients <= apps.ROOM
    assert allowed.settings == apps.LOWERED


def test_an_app_measures_how_many_clients_fit() -> None:
    assert Worker(apps.small_memory, 1).capacity(pack(train_message(2)), context(0), {}, 4).clients == apps.ROOM
    assert Worker(apps.plain, 1).capacity(pack(train_message(2)), context(0), {}, 4) == Capacity(1)


def test_what_an_app_prepares_is_done_before_messages_and_may_fail() -> None:
    app, prepared = CohortClientApp(), []

    @app.preparation
    def prepare(of: Context, known: Mapping[Any, Any]) -> None:
        prepared.append((of.node_id, dict(known)))
        raise ValueError("is told with the first message")

    Worker(app, 1).prepare(context(3), {"sound": None})
    assert prepared == [(5, {"sound": None})]
    Worker(apps.plain, 1).prepare(context(3), {})  # an app that prepares nothing
