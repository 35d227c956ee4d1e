"""RayGrid: order, failures, states and shared arrays, on real workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedlora.capacity import Capacity
from fedlora.errors import ClientErrorCode, InputError
from fedlora.simulation import RayGrid, placement, ray_cluster, ray_exchange, ray_workers
from fedlora.simulation.simulated_grid import FIRST_NODE_ID
from tests.simulation import apps

CLIENTS = 8

pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cohorts of three answer in two parts."""
    monkeypatch.setattr(ray_exchange, "PART", 2)
    monkeypatch.setattr(ray_exchange, "MOST", 2)


@pytest.fixture(scope="module")
def grid(ray_here: None) -> Iterator[RayGrid]:
    """Two workers that handle one client at a time; its states are those of all tests before."""
    config = {"config": "x = 1", "number": 3}
    with RayGrid(apps.plain, CLIENTS, workers=2, run_config=config) as grid:
        yield grid


@pytest.fixture(scope="module")
def cohort_grid(ray_here: None) -> Iterator[RayGrid]:
    """One worker that gets three clients at once."""
    with RayGrid("tests.simulation.apps:cohort", CLIENTS, workers=1, cohort_size=3) as grid:
        yield grid


def messages(
    do: dict[str, Any] | None = None, clients: Any = range(CLIENTS), arrays: ArrayRecord | None = None
) -> list[Message]:
    content = RecordDict({"do": ConfigRecord(do or {})})
    if arrays is not None:
        content["arrays"] = arrays
    return [Message(content, FIRST_NODE_ID + i, "train", group_id="1") for i in clients]


def exchange(
    grid: RayGrid, do: dict[str, Any], after: dict[int, int], folder: Path, clients: Any = range(CLIENTS)
) -> Iterator[Message]:
    """Yield replies; clients in ``after`` wait until so many of them have arrived.

    A worker that ends takes finished replies along that are still under way: their arrival must not depend on luck.
    """
    awaited = {f"await-{client}": str(folder / str(client)) for client in after}
    for arrived, reply in enumerate(grid.send_and_receive(messages(do | awaited, clients)), 1):
        for client, count in after.items():
            if arrived == count:
                (folder / str(client)).touch()
        yield reply


def clients_of(replies: list[Message]) -> list[int]:
    return [reply.metadata.src_node_id - FIRST_NODE_ID for reply in replies]


def metric(replies: list[Message], name: str) -> list[Any]:
    return [reply.content["metrics"][name] for reply in replies]


def calls(grid: RayGrid, client: int) -> int:
    state = grid.states.get(client)
    return int(state["count"]["calls"]) if state else 0  # type: ignore[arg-type]


def test_nodes_follow_the_partitions(grid: RayGrid) -> None:
    assert list(grid.get_node_ids()) == [FIRST_NODE_ID + i for i in range(CLIENTS)]
    assert grid.num_workers == 2


def test_parts_are_larger_where_replies_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_exchange, "PART", 16)
    monkeypatch.setattr(ray_exchange, "MOST", 64)
    sizes = (None, 0, 2**17, 2**19, 2**23, 2**30)
    assert [ray_exchange.part_size(size) for size in sizes] == [16, 64, 64, 32, 16, 16]


def test_the_largest_reply_is_known(grid: RayGrid) -> None:
    arrays = ArrayRecord({"x": Array(np.zeros(40)), "y": Array(np.zeros(4))})
    grid.reply_bytes.clear()
    for clients in ([0, 1], [2]):
        list(grid.send_and_receive(messages(clients=clients, arrays=arrays if len(clients) == 2 else None)))
    assert grid.reply_bytes == {"train": sum(len(array.data) for array in arrays.values())}


def test_warnings_of_workers_are_said_once(ray_here: None, caplog: pytest.LogCaptureFixture) -> None:
    app = "tests.simulation.apps:short"
    with RayGrid(app, CLIENTS, workers=1, cohort_size=3) as grid, caplog.at_level("WARNING", "fedlora"):
        for _ in range(2):
            list(grid.send_and_receive(messages()))
    said = [record.getMessage() for record in caplog.records]
    assert said
    assert all("one at a time, since a pass of several failed (TypeError" in line for line in said)
    assert len(said) == len(set(said))


def test_replies_come_in_order_whatever_ends_first(grid: RayGrid) -> None:
    asked = [5, 0, 3, 1, 7]
    began: dict[int, float] = {}
    replies = []
    for reply in grid.send_and_receive(messages({"sleep-5": 0.6, "sleep-0": 0.2}, asked)):
        began[reply.metadata.src_node_id - FIRST_NODE_ID] = time.monotonic()
        replies.append(reply)
    assert clients_of(replies) == asked
    assert metric(replies, "client") == asked
    assert len(set(metric(replies, "pid"))) == 2
    ids = [reply.metadata.reply_to_message_id for reply in replies]
    assert len(set(ids)) == 5


def test_a_reply_is_there_before_the_last_client_is_done(grid: RayGrid, tmp_path: Path) -> None:
    replies = list(exchange(grid, {}, {7: 1}, tmp_path))
    assert clients_of(replies) == list(range(CLIENTS))
    assert not any(reply.has_error() for reply in replies)


def test_replies_answer_their_messages(grid: RayGrid) -> None:
    asked = messages(clients=[2, 4])
    replies = list(grid.send_and_receive(asked))
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in asked]
    assert {(r.metadata.dst_node_id, r.metadata.group_id, r.metadata.message_type) for r in replies} == {
        (1, "1", "train")
    }


def test_clients_see_their_partition_the_run_config_and_their_threads(grid: RayGrid) -> None:
    (reply,) = grid.send_and_receive(messages(clients=[6]))
    assert metric([reply], "client") == [6]
    assert metric([reply], "partitions") == [CLIENTS]
    assert metric([reply], "threads") == [1]
    seen = reply.content["seen"]
    assert (seen["run-config"], seen["run-number"], seen["simulated"]) == ("x = 1", 3, True)


def test_states_persist_over_rounds_and_workers(grid: RayGrid) -> None:
    before = {client: calls(grid, client) for client in range(CLIENTS)}
    for _ in range(3):
        list(grid.send_and_receive(messages(clients=[1, 2])))
    (reply,) = grid.send_and_receive(messages(clients=[1]))
    assert metric([reply], "calls") == [before[1] + 4]
    assert {c: calls(grid, c) - before[c] for c in (1, 2, 3)} == {1: 4, 2: 3, 3: 0}


def test_an_exception_is_that_clients_alone(grid: RayGrid) -> None:
    before = [calls(grid, client) for client in range(CLIENTS)]
    replies = list(grid.send_and_receive(messages({"raise-1": True, "raise-6": True})))
    assert clients_of(replies) == list(range(CLIENTS))
    failed = {c: r.error for c, r in zip(clients_of(replies), replies, strict=True) if r.has_error()}
    assert sorted(failed) == [1, 6]
    for client, error in failed.items():
        assert error.code == ClientErrorCode.FAILED
        assert error.reason.startswith("Traceback")
        assert "apps.py" in error.reason
        assert error.reason.strip().endswith(f"ValueError: client {client} is out of luck")
    # What a failed client wrote into its state is undone: nothing of it was released.
    after = [calls(grid, client) for client in range(CLIENTS)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 0, 1, 1, 1, 1, 0, 1]


def test_an_answer_that_is_no_message_is_that_clients_failure(grid: RayGrid) -> None:
    bad, good = grid.send_and_receive(messages({"nonsense-0": True}, [0, 1]))
    assert bad.error.code == ClientErrorCode.FAILED
    assert "NoneType" in bad.error.reason
    assert good.has_content()


def test_a_worker_that_ends_takes_only_its_client_along(grid: RayGrid, tmp_path: Path) -> None:
    before = [calls(grid, client) for client in range(CLIENTS)]
    replies = list(exchange(grid, {"die-2": True, "die-5": True}, {2: 2, 5: 5}, tmp_path))
    assert clients_of(replies) == list(range(CLIENTS))
    failed = {c: r.error for c, r in zip(clients_of(replies), replies, strict=True) if r.has_error()}
    assert {client: error.code for client, error in failed.items()} == {
        2: ClientErrorCode.WORKER_DIED,
        5: ClientErrorCode.WORKER_DIED,
    }
    assert "the worker of this client ended" in failed[2].reason
    after = [calls(grid, client) for client in range(CLIENTS)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 0, 1, 1, 0, 1, 1]
    again = list(grid.send_and_receive(messages()))
    assert not any(reply.has_error() for reply in again)
    assert metric(again, "calls") == [b + 2 - (c in (2, 5)) for c, b in enumerate(before)]


def test_late_replies_are_given_up_and_the_grid_goes_on(grid: RayGrid) -> None:
    list(grid.send_and_receive(messages()))  # both workers are up
    before = calls(grid, 0)
    started = time.monotonic()
    replies = list(grid.send_and_receive(messages({"sleep-0": 60.0}, [0, 1, 2, 3]), timeout=5.0))
    assert time.monotonic() - started < 50
    # Those that the other worker had time for came, in order, though they waited for client 0.
    assert clients_of(replies) == sorted(clients_of(replies))
    late = [c for c, reply in zip(clients_of(replies), replies, strict=True) if reply.has_error()]
    assert late[0] == 0
    assert 1 in set(clients_of(replies)) - set(late)
    assert {reply.error.code for reply in replies if reply.has_error()} == {ClientErrorCode.LATE}
    assert calls(grid, 0) == before
    (reply,) = grid.send_and_receive(messages(clients=[0]), timeout=600.0)
    assert metric([reply], "calls") == [before + 1]


def test_a_client_that_is_late_does_not_keep_others_from_their_turn(ray_here: None) -> None:
    """More of them than replies are held where workers are busy."""
    with RayGrid(apps.plain, 40, workers=2) as grid:
        list(grid.send_and_receive(messages(clients=range(2))))  # both workers are up
        replies = list(grid.send_and_receive(messages({"sleep-0": 60.0}, range(40)), timeout=8.0))
    late = [c for c, reply in zip(clients_of(replies), replies, strict=True) if reply.has_error()]
    assert late[0] == 0
    assert len(late) <= ray_exchange.QUEUED
    assert clients_of(replies) == list(range(40))


def test_nothing_asked_is_nothing_answered(grid: RayGrid) -> None:
    assert list(grid.send_and_receive([])) == []


def odd_record() -> ArrayRecord:
    return ArrayRecord(
        {
            "f": Array(np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)),
            "i": Array(np.arange(12, dtype=np.int64).reshape(3, 4)),
            "scalar": Array(np.full((), 2.5)),
            "empty": Array(np.zeros((0, 3), np.float32)),
            "large": Array(np.random.default_rng(0).normal(size=(300, 300))),
        }
    )


@pytest.mark.parametrize("asked", [[3], [0, 1, 2, 3]])
def test_arrays_arrive_bit_equal(grid: RayGrid, asked: list[int]) -> None:
    record = odd_record()
    replies = list(grid.send_and_receive(messages(clients=asked, arrays=record)))
    assert len(replies) == len(asked)
    for reply in replies:
        assert reply.content["seen"]["sha-arrays"] == apps.sha(record)
        assert apps.sha(reply.content["arrays"]) == apps.sha(record)


def test_a_shared_record_is_one_object_a_worker_and_round(cohort_grid: RayGrid) -> None:
    replies = list(cohort_grid.send_and_receive(messages(arrays=odd_record())))
    assert len({reply.content["seen"]["id-arrays"] for reply in replies}) == 1


def test_two_rounds_do_not_mix_their_shared_records(grid: RayGrid) -> None:
    for round_number in range(3):
        record = ArrayRecord({"x": Array(np.full(1000, round_number, np.float32))})
        replies = list(grid.send_and_receive(messages(arrays=record)))
        assert {reply.content["seen"]["sha-arrays"] for reply in replies} == {apps.sha(record)}
        del record  # its id may come again


def test_messages_may_carry_different_records(grid: RayGrid) -> None:
    shared = ArrayRecord({"x": Array(np.zeros(3))})
    own = [ArrayRecord({"x": Array(np.full(3, float(i)))}) for i in range(4)]
    asked = [Message(RecordDict({"all": shared, "own": own[i]}), FIRST_NODE_ID + i, "train") for i in range(4)]
    for i, reply in enumerate(grid.send_and_receive(asked)):
        assert reply.content["seen"]["sha-all"] == apps.sha(shared)
        assert reply.content["seen"]["sha-own"] == apps.sha(own[i])


def test_pushed_messages_are_pulled_by_their_ids(grid: RayGrid) -> None:
    ids = list(grid.push_messages(messages(clients=[3, 1, 2])))
    assert len(set(ids)) == 3
    replies = list(grid.pull_messages([ids[2], "unknown", ids[0]]))
    assert clients_of(replies) == [2, 3]
    assert list(grid.pull_messages([ids[2]])) == []
    assert clients_of(list(grid.pull_messages(ids))) == [1]


def test_a_message_is_made_as_asked(grid: RayGrid) -> None:
    meta = grid.create_message(RecordDict(), "query", 4, "7", ttl=3.0).metadata
    assert (meta.dst_node_id, meta.message_type, meta.group_id, meta.ttl) == (4, "query", "7", 3.0)


# Cohorts.


def test_clients_come_in_cohorts(cohort_grid: RayGrid) -> None:
    replies = list(cohort_grid.send_and_receive(messages()))
    assert clients_of(replies) == list(range(CLIENTS))
    assert metric(replies, "cohort") == [3, 3, 3, 3, 3, 3, 2, 2]


def test_an_automatic_cohort_is_what_fits_and_leaves_some_for_every_worker(ray_here: None) -> None:
    for clients, workers, expected in ((9, 1, apps.ROOM), (4, 2, 2)):
        told: list[Capacity] = []
        app = "tests.simulation.apps:small_memory"
        with RayGrid(app, clients, workers=workers, cohort_size="auto", on_capacity=told.append) as grid:
            replies = list(grid.send_and_receive(messages(clients=range(clients))))
        share = -(-clients // workers)
        assert told == [Capacity(expected, {"rows": share}, "as many as fit"), Capacity(expected, apps.LOWERED)]
        assert metric(replies, "cohort")[0] == expected


def test_the_first_replies_of_a_cohort_are_there_before_the_last_are_made(ray_here: None, tmp_path: Path) -> None:
    with RayGrid("tests.simulation.apps:streaming", 5, workers=1, cohort_size=5) as grid:
        list(grid.send_and_receive(messages(clients=range(5))))  # the worker is up
        replies = list(exchange(grid, {}, {4: 2}, tmp_path, range(5)))
        assert clients_of(replies) == list(range(5))
        assert metric(replies, "cohort") == [5] * 5
        assert [calls(grid, client) for client in range(5)] == [2] * 5


def test_who_ends_its_workers_in_a_cohort_is_given_up_alone_and_what_was_answered_is_not_answered_again(
    ray_here: None, tmp_path: Path
) -> None:
    with RayGrid("tests.simulation.apps:streaming", 10, workers=1, cohort_size=5) as grid:
        replies = list(exchange(grid, {"die-3": True}, {3: 2}, tmp_path, range(10)))
        assert clients_of(replies) == list(range(10))
        assert [reply.has_error() for reply in replies] == [client == 3 for client in range(10)]
        assert [calls(grid, client) for client in range(10)] == [int(client != 3) for client in range(10)]


def test_clients_of_like_work_share_a_cohort_and_replies_keep_their_order(ray_here: None) -> None:
    work = [1, 5, 1, 5, 1, 5]
    with RayGrid("tests.simulation.apps:cohort", 6, workers=1, cohort_size=3, work=lambda client: work[client]) as grid:
        first = messages(clients=range(6))
        replies = list(grid.send_and_receive(first))
    assert clients_of(replies) == list(range(6))
    assert metric(replies, "cohort") == [3] * 6


def test_questions_come_one_by_one(cohort_grid: RayGrid) -> None:
    asked = [Message(RecordDict(), FIRST_NODE_ID + i, "query") for i in range(4)]
    replies = list(cohort_grid.send_and_receive(asked))
    assert metric(replies, "cohort") == [1, 1, 1, 1]


def test_after_an_exception_a_cohort_runs_one_by_one_from_where_it_was(cohort_grid: RayGrid) -> None:
    before = [calls(cohort_grid, client) for client in range(CLIENTS)]
    replies = list(cohort_grid.send_and_receive(messages({"raise-1": True})))
    assert clients_of(replies) == list(range(CLIENTS))
    assert [reply.has_error() for reply in replies] == [i == 1 for i in range(CLIENTS)]
    assert "client 1 is out of luck" in replies[1].error.reason
    assert metric(replies[:1] + replies[2:], "cohort") == [1, 1, 3, 3, 3, 2, 2]
    # Client 0 was handled twice, but its state knows of one: else a ledger would be charged twice.
    after = [calls(cohort_grid, client) for client in range(CLIENTS)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 0, 1, 1, 1, 1, 1, 1]


def test_a_cohort_runs_again_when_its_worker_ends(cohort_grid: RayGrid, tmp_path: Path) -> None:
    before = [calls(cohort_grid, client) for client in range(CLIENTS)]
    replies = list(cohort_grid.send_and_receive(messages({"die-once-4": str(tmp_path / "died")})))
    assert (tmp_path / "died").exists()
    assert clients_of(replies) == list(range(CLIENTS))
    # As a whole, so that nothing depends on what died.
    assert metric(replies, "cohort") == [3, 3, 3, 3, 3, 3, 2, 2]
    assert [calls(cohort_grid, client) - n for client, n in enumerate(before)] == [1] * CLIENTS


def test_a_worker_that_is_killed_between_two_exchanges_is_replaced(grid: RayGrid) -> None:
    (first,) = grid.send_and_receive(messages(clients=[0]))
    os.kill(metric([first], "pid")[0], signal.SIGKILL)
    replies = list(grid.send_and_receive(messages()))
    assert not any(reply.has_error() for reply in replies)
    assert metric(replies, "client") == list(range(CLIENTS))


# What does not fit.


def test_a_grid_leaves_a_ray_that_it_did_not_start() -> None:
    RayGrid(apps.plain, 1, workers=1).close()
    assert ray.is_initialized()


def test_an_app_that_cannot_be_loaded_is_told_by_every_client() -> None:
    with RayGrid("tests.simulation.no_such_module:app", 3, workers=1) as broken:
        replies = list(broken.send_and_receive(messages(clients=range(3))))
    assert [reply.error.code for reply in replies] == [ClientErrorCode.FAILED] * 3
    assert "No module named 'tests.simulation.no_such_module'" in replies[2].error.reason


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"workers": 99}, "simulation.workers"),
        ({"cpus_per_worker": 64}, "simulation.cpus_per_worker"),
        ({"gpus_per_worker": 0.5}, "simulation.gpus_per_worker"),
        ({"workers": 3, "cpus_per_worker": 4}, "simulation.workers"),
    ],
)
def test_resources_that_are_not_there_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        RayGrid(apps.plain, 1, **options)
    assert caught.value.field == field
    assert caught.value.value == options[field.partition(".")[2]]


def test_by_default_there_are_as_many_workers_as_fit() -> None:
    with RayGrid(apps.plain, 1, cpus_per_worker=4) as half:
        assert half.num_workers == 2


def test_a_ray_that_others_fill_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without room would be waited for without end."""
    monkeypatch.setattr(placement, "_FREED_SECONDS", 0.0)
    monkeypatch.setattr(ray_workers, "_OPEN", set())
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    with pytest.raises(InputError, match=r"workers = 2: others hold so much that 1 workers find room \(1 CPU, 0 GPU"):
        RayGrid(apps.plain, 2, workers=2)
    with RayGrid(apps.plain, 2) as alone:
        assert alone.num_workers == 1
    monkeypatch.setattr(ray, "available_resources", dict)
    with pytest.raises(InputError, match=r"cpus_per_worker = 1: .* 0 workers find room .*ray\.shutdown\(\)"):
        RayGrid(apps.plain, 2)


def test_another_address_than_that_of_the_running_ray_is_told() -> None:
    with pytest.raises(InputError, match=r"simulation\.address = '10\.0\.0\.1:6379': .* call ray\.shutdown\(\) first"):
        ray_cluster.start_ray("10.0.0.1:6379")
    assert not ray_cluster.start_ray(ray.get_runtime_context().gcs_address)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_too_long_for_sockets_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /tmp/x")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, "/tmp/" + "x" * 120)
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(
        InputError, match=rf"^{variable} = '.*': is too long .* set the environment variable RAY_TMPDIR"
    ):
        ray_cluster.start_ray(None)
