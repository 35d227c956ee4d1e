"""SIGKILL of what takes part in a run: the run finishes or resumes, and the owner's ledger holds the steps taken."""

from __future__ import annotations

import contextlib
import csv
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.deployment.federation import NAME, Federation, until
from tests.deployment.test_federation import config_of

pytestmark = [pytest.mark.federation, pytest.mark.timeout(1500)]

ROUNDS, STEPS = 4, 20
# Of a round: long enough for a machine that is busy with something else.
TIMEOUT = 100.0


@pytest.fixture(autouse=True)
def whole(federation: Federation) -> None:
    """All nodes are there, and no old spending stands in the way."""
    federation.set_policy(allow_non_private=True)
    federation.wait_online(3, 300)


class Run:
    """A run that goes on while the test does its harm."""

    def __init__(self, federation: Federation, examples: Path, name: str, ceiling: bool = True) -> None:
        self.federation, self.name = federation, name
        self.before = {node: set(self._charges(node)) for node in federation.data}
        # Enough steps that a round can be hit in its middle.
        content: dict[str, Any] = config_of(
            examples, name, run={"rounds": ROUNDS}, client={"local_steps": STEPS, "learning_rate": 0.1},
            server={"timeout": TIMEOUT, "min_replies": 2},
        )  # fmt: skip
        if not ceiling:
            del content["privacy"]["target_epsilon"]
            content["privacy"]["noise_multiplier"] = 1.0
        self.path = federation.folder / f"{name}.run.toml"
        self.path.write_text(tomli_w.dumps(content), encoding="utf-8")
        self.folder = federation.folder / "runs" / name
        self.there = federation.folder / "server" / "runs" / name
        federation.start(name, "run", self.path, "--on", NAME)

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl on the server."""
        path = self.there / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def charged(self, node: str) -> dict[int, int]:
        """Steps by round in an owner's ledger, of this run and what it was resumed as."""
        steps: dict[int, int] = {}
        for number, (server_round, count) in self._charges(node).items():
            if number not in self.before[node]:
                steps[server_round] = steps.get(server_round, 0) + count
        return steps

    def _charges(self, node: str) -> dict[int, tuple[int, int]]:
        path = self.federation.folder / f"state-{node}" / "ledger.sqlite"
        if not path.exists():
            return {}
        with contextlib.closing(sqlite3.connect(path)) as connection:
            rows = connection.execute("SELECT number, round, steps FROM charges").fetchall()
        return {number: (server_round, steps) for number, server_round, steps in rows}

    def until_round(self, number: int) -> None:
        """Wait until a round is done."""
        until(lambda: len(self.rounds()) >= number, 600, f"round {number}")

    def until_training(self, node: str, server_round: int) -> None:
        """Wait until a node has charged a step of a round."""
        until(lambda: self.charged(node).get(server_round, 0) > 0, 300, f"training on {node}")

    def end(self) -> int:
        """Wait for the command; return its exit code."""
        return self.federation.processes.pop(self.name).wait(1000)


def released(folder: Path, client: int) -> dict[int, int]:
    """Steps by round in privacy.csv, of one client."""
    with (folder / "privacy.csv").open(encoding="utf-8") as stream:
        return {int(row["round"]): int(row["steps"]) for row in csv.DictReader(stream) if int(row["client"]) == client}


def test_a_node_that_is_killed_in_a_round(federation: Federation, examples: Path) -> None:
    run = Run(federation, examples, "node-killed")
    run.until_round(1)
    run.until_training("north", 2)
    federation.kill("supernode_process", "north")
    federation.kill("fedlora.node.worker_process", "north")
    assert run.end() == 0, federation.output("node-killed")
    lines = run.rounds()
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert all(line["counted"] for line in lines)
    assert [failure["client"] for failure in lines[1]["failed"]] == [1]
    # The round in which it vanished waits for its timeout; after that nobody waits for it.
    assert sum(lines[2]["seconds"].values()) < TIMEOUT
    assert sum(lines[1]["seconds"].values()) < TIMEOUT + 20
    steps = run.charged("north")
    assert steps[1] == STEPS
    assert 0 < steps[2] < STEPS
    assert released(run.folder, 1).get(2) is None
    assert released(run.folder, 0) == {r: run.charged("east")[r] for r in (1, 2, 3, 4)}


def test_a_resident_worker_that_is_killed_in_a_round(federation: Federation, examples: Path) -> None:
    run = Run(federation, examples, "worker-killed")
    run.until_round(1)
    run.until_training("west", 2)
    federation.kill("fedlora.node.worker_process", "west")
    assert run.end() == 0, federation.output("worker-killed")
    lines = run.rounds()
    assert [failure["client"] for failure in lines[1]["failed"]] == [2]
    assert [line["failed"] for line in lines[2:]] == [[], []]
    steps = run.charged("west")
    assert 0 < steps.pop(2) < STEPS
    assert steps == dict.fromkeys((1, 3, 4), STEPS) == released(run.folder, 2)


def test_a_superlink_that_is_killed_between_rounds(federation: Federation, examples: Path) -> None:
    # A target leaves no epsilon for a round that is trained twice; how many nodes do that is a matter of milliseconds.
    run = Run(federation, examples, "server-killed", ceiling=False)
    run.until_round(2)
    federation.kill("superlink_process")
    code = run.end()
    assert code == 1
    assert "--resume" in federation.output("server-killed")
    federation.wait_online(3, 300)
    done = len(run.rounds())
    assert done >= 2
    again = federation.fedlora("run", run.path, "--on", NAME, "--resume", timeout=900)
    assert again.returncode == 0, again.stdout + again.stderr
    lines = run.rounds()
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    for client, node in enumerate(("east", "north", "west")):
        taken = run.charged(node)
        kept = released(run.folder, client)
        assert set(kept) == {1, 2, 3, 4}
        # A round that was begun and lost with the SuperLink is charged, and then trained again.
        assert all(taken[r] >= kept[r] == STEPS for r in kept)
        assert sum(taken.values()) <= (ROUNDS + 1) * STEPS
