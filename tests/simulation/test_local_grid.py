"""LocalGrid: what RayGrid does, in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedlora.capacity import Capacity
from fedlora.errors import ClientErrorCode
from fedlora.simulation import CohortClientApp, LocalGrid
from fedlora.simulation.simulated_grid import FIRST_NODE_ID
from tests.simulation import apps
from tests.tiny import save_llama

CLIENTS = 5
ROOT = Path(__file__).parents[2]


def messages(do: dict[str, Any] | None = None, arrays: ArrayRecord | None = None) -> list[Message]:
    content = RecordDict({"do": ConfigRecord(do or {})})
    if arrays is not None:
        content["arrays"] = arrays
    return [Message(content, FIRST_NODE_ID + i, "train", group_id="1") for i in range(CLIENTS)]


def metric(replies: list[Message], name: str) -> list[Any]:
    return [reply.content["metrics"][name] for reply in replies]


def test_clients_run_here_in_order_and_keep_their_states() -> None:
    threads = torch.get_num_threads()
    with LocalGrid(apps.plain, CLIENTS, cpus_per_worker=threads + 1, run_config={"config": "x = 1"}) as grid:
        for call in (1, 2):
            replies = list(grid.send_and_receive(messages()))
            assert metric(replies, "client") == list(range(CLIENTS))
            assert set(metric(replies, "pid")) == {os.getpid()}
            assert set(metric(replies, "calls")) == {call}
            assert set(metric(replies, "threads")) == {threads + 1}
            assert {reply.content["seen"]["simulated"] for reply in replies} == {True}
            assert {reply.content["seen"]["run-config"] for reply in replies} == {"x = 1"}
    assert torch.get_num_threads() == threads


def test_cohorts_go_by_work_and_replies_by_message() -> None:
    work = [1.0, 5.0, 2.0, 4.0, 3.0]
    with LocalGrid("tests.simulation.apps:cohort", CLIENTS, cohort_size=2, work=lambda client: work[client]) as grid:
        replies = list(grid.send_and_receive(messages()))
    assert metric(replies, "client") == list(range(CLIENTS))
    assert metric(replies, "cohort") == [1, 2, 2, 2, 2]  # the least work is left alone


def test_warnings_of_clients_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with LocalGrid(apps.short, CLIENTS, cohort_size=2) as grid, caplog.at_level("WARNING", "fedlora"):
        for _ in range(2):
            list(grid.send_and_receive(messages()))
    assert caplog.text.count("one at a time") == 1


def test_a_client_that_fails_keeps_its_state_and_touches_no_other() -> None:
    with LocalGrid("tests.simulation.apps:cohort", CLIENTS, cohort_size=CLIENTS) as grid:
        list(grid.send_and_receive(messages()))
        replies = list(grid.send_and_receive(messages({"raise-3": True})))
        assert [reply.has_error() for reply in replies] == [False, False, False, True, False]
        assert replies[3].error.code == ClientErrorCode.FAILED
        assert "out of luck" in str(replies[3].error.reason)
        assert metric(list(grid.send_and_receive(messages())), "calls") == [3, 3, 3, 2, 3]


def test_auto_asks_the_app() -> None:
    """And tells what it chose, and once what its training had to lower."""
    told: list[Capacity] = []
    with LocalGrid(apps.small_memory, CLIENTS, cohort_size="auto", on_capacity=told.append) as grid:
        for _ in range(2):
            list(grid.send_and_receive(messages()))
    assert told == [Capacity(apps.ROOM, {"rows": CLIENTS}, "as many as fit"), Capacity(apps.ROOM, apps.LOWERED)]


def test_a_cohort_that_does_not_fit_is_halved_from_where_it_was() -> None:
    told: list[Capacity] = []
    with LocalGrid(apps.small_memory, CLIENTS, cohort_size=CLIENTS, on_capacity=told.append) as grid:
        replies = list(grid.send_and_receive(messages()))
    assert told == [Capacity(2, apps.LOWERED)]
    assert metric(replies, "calls") == [1] * CLIENTS


def test_arrays_pass_unchanged() -> None:
    record = ArrayRecord({"w": Array(torch.arange(6.0).numpy())})
    with LocalGrid(apps.plain, CLIENTS) as grid:
        replies = list(grid.send_and_receive(messages(arrays=record)))
    assert {reply.content["seen"]["sha-arrays"] for reply in replies} == {apps.sha(record)}


def test_who_is_at_work_at_the_timeout_is_late_and_what_is_left_is_given_up() -> None:
    with LocalGrid(apps.plain, CLIENTS) as grid:
        first, late = grid.send_and_receive(messages({"sleep-1": 0.3}), timeout=0.2)
    assert metric([first], "client") == [0]
    assert late.error.code == ClientErrorCode.LATE
    assert late.metadata.src_node_id == FIRST_NODE_ID + 1


def test_pushed_messages_are_pulled() -> None:
    with LocalGrid(apps.plain, CLIENTS) as grid:
        pushed = list(grid.push_messages(messages()))
        assert metric(list(grid.pull_messages(pushed[1:3])), "client") == [1, 2]


def test_the_app_is_prepared_with_what_the_server_knows() -> None:
    prepared: list[Any] = []
    app = CohortClientApp()
    app.preparation(lambda context, known: prepared.append((context.run_config, known, torch.get_num_threads())))
    threads = torch.get_num_threads()
    with LocalGrid(app, CLIENTS, cpus_per_worker=threads + 1, run_config={"config": "c"}) as grid:
        grid.prepare({(64, 0): None})
    assert prepared == [({"config": "c"}, {(64, 0): None}, threads + 1)]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("section", [{"workers": 0}, {}])
def test_a_run_in_this_process_imports_no_ray(section: dict[str, int], tmp_path: Path) -> None:
    """Ray takes seconds to import, and is not there on every machine that a run without it fits.

    By default that is a machine of one core. Such a run leaves no model in memory; one that asked for it, for the next.
    """
    save_llama(tmp_path / "model")
    lines = "".join(json.dumps({"text": f"w4 w5 w{word}"}) + "\n" for word in range(6, 26))
    (tmp_path / "texts.jsonl").write_text(lines)
    config = {
        "run": {"name": "local", "rounds": 1},
        "model": {"name": str(tmp_path / "model"), "task": "causal-lm", "max_length": 8},
        "data": {"name": "texts.jsonl", "test": "texts.jsonl", "partition": {"clients": 2}},
        "method": {"name": "fedit", "rank": 2},
        "client": {"batch_size": 4, "local_steps": 1},
        "simulation": section,
    }
    code = (
        "import json, os, sys, fedlora; os.cpu_count = lambda: 1; r = fedlora.simulate(json.load(sys.stdin)); "
        "from fedlora.clients.resources import _model; ray = [n for n in sys.modules if n.split('.')[0] == 'ray']; "
        "print(r.summary['rounds'], ray, _model.cache_info().currsize)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, input=json.dumps(config), capture_output=True, text=True,
        env={**os.environ, "FEDLORA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == [f"1 [] {len(section)}"], done.stdout + done.stderr
    log = (tmp_path / "runs" / "local" / "run.log").read_text()
    assert ("clients train in the run's own process" in log) == (not section)
