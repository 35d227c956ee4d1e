"""What a node's resident worker saves: seconds of a node's first messages on SmolLM2, its weights on the node's disk.

Message 1 asks the node what it holds, 2 trains round 1, 3 and 4 the rounds after it. The messages are those of a run;
only the SuperLink between server and node is left out. ``handled`` is what the worker itself took for a message.
``started`` has its worker since it joined, as ``fedlora node`` does; ``idle`` had none left, so message 1 starts it;
``fresh`` ends it after every message, which is what Flower's process a message would cost without it::

    python -m fedlora.experiments.benchmarks.resident_worker --output resident_worker.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tomli_w
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlora.clients.node_app import APP, app
from fedlora.config import load_config
from fedlora.data.sources import load_examples
from fedlora.data.tokens import prepare_data
from fedlora.experiments.benchmarks.machine import machine
from fedlora.node.config import load_node
from fedlora.node.names import NODE_FILE
from fedlora.node.resident import start_worker, stop_worker
from fedlora.results.folder import RunFolder
from fedlora.strategies import get_strategy
from fedlora.strategies.federation import run_federation
from fedlora.strategies.server_app import resolve

CONFIG: dict[str, Any] = {
    "run": {"name": "resident-worker", "rounds": 3},
    "model": {"name": "asset:smollm2-135m", "task": "causal-lm", "max_length": 32},
    "data": {"name": "nodes", "partition": {"clients": 1}},
    "method": {"name": "ffa-lora", "rank": 8},
    "client": {"batch_size": 4, "local_steps": 1},
    "privacy": {"mode": "example", "target_epsilon": 8.0, "target_delta": 1e-3},
    "server": {"timeout": 600.0, "evaluate_every": 3},
}
POSTS = {
    "model": CONFIG["model"],
    "data": {
        "name": "asset:20newsgroups", "max_examples": 400, "max_test_examples": 8, "partition": {"clients": 1},
    },
    "method": CONFIG["method"],
}  # fmt: skip
NODE, RUN = 1, 7
WORKERS = ("started", "idle", "fresh")


class OneNode(Grid):
    """A Grid of one node on this machine, which keeps the seconds of every message."""

    def __init__(self, node_file: Path, config: str, worker: str) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, NODE
        self.node_file, self.worker = node_file, worker
        self.context = Context(RUN, NODE, {NODE_FILE: str(node_file)}, RecordDict(), {"config": config})
        self.seconds: list[dict[str, Any]] = []

    def set_run(self, run: Run) -> None:
        """Do nothing."""

    @property
    def run(self) -> Run:
        """Return the run."""
        return Run.create_empty(RUN)

    def create_message(self, *_: Any, **__: Any) -> Message:
        """Make no messages."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """Return the node."""
        return [NODE]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take no messages for later."""
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Have no replies from before."""
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Let the node's worker answer."""
        for message in messages:
            message.metadata.__dict__["_run_id"] = RUN
            began = time.perf_counter()
            reply = app(message, self.context)
            self.seconds.append({"kind": message.metadata.message_type, "seconds": time.perf_counter() - began})
            if reply.has_error():
                raise RuntimeError(f"{reply.error.reason}: see {self.node_file.parent}")
            if self.worker == "fresh":
                time.sleep(0.5)  # it still writes its log
                stop_worker(load_node(self.node_file))
            yield reply


def measure(worker: str, threads: int) -> dict[str, Any]:
    """Run a federation of one node; return the seconds of each message, whole and in the worker."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = load_examples(load_config(POSTS))
        assert found.train is not None
        assert found.test is not None
        found.train.select_columns(["text"]).to_json(folder / "posts.jsonl")
        found.test.select_columns(["text"]).to_json(folder / "test.jsonl")
        cache = Path(os.environ.get("FEDLORA_CACHE", "~/.cache/fedlora")).expanduser()
        node = {
            "name": "clinic",
            "superlink": {"address": "127.0.0.1:1"},
            "data": {"path": "posts.jsonl"},
            "policy": {"max_epsilon": 100.0, "delta": 1e-3},
            "worker": {"threads": threads, "device": "cpu"},
            "state": {"cache": str(cache)},
        }
        node_file = folder / "node.toml"
        node_file.write_text(tomli_w.dumps(node), encoding="utf-8")
        config = resolve(load_config(CONFIG, {"data.test": str(folder / "test.jsonl")}))
        grid = OneNode(node_file, config.to_toml(), worker)
        run = RunFolder.create(folder / "run", config)
        try:
            if worker == "started":
                _start(node_file)
            run_federation(config, grid, run, prepare_data(config), get_strategy(config.method.name)(config))
        finally:
            run.close()
            stop_worker(load_node(node_file))
        log = (folder / "state" / "worker" / "worker.log").read_text()
    handled = re.findall(r"INFO (?:query|train)\S* of run \d+: .*, ([\d.]+) s", log)
    for row, seconds in zip(grid.seconds, handled, strict=True):
        row["handled"] = float(seconds)
    return {"worker": worker, "threads": threads, "messages": grid.seconds}


def _start(node_file: Path) -> None:
    """Start the worker, and wait until it is ready for a message."""
    log = node_file.parent / "state" / "worker" / "worker.log"
    start_worker(node_file, load_node(node_file), APP)
    while not log.exists() or "is ready after" not in log.read_text():
        time.sleep(0.1)


def main() -> None:
    """Measure, print a table and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="+", choices=WORKERS, default=WORKERS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    # What is downloaded and converted once for all runs is no part of a message.
    prepare_data(load_config(POSTS))
    results = []
    print(f"{'worker':>8} {'message':>8} {'kind':>6} {'seconds':>8} {'handled':>8}")
    for worker in arguments.workers:
        results.append(measure(worker, arguments.threads))
        for number, row in enumerate(results[-1]["messages"], 1):
            print(f"{worker:>8} {number:8d} {row['kind']:>6} {row['seconds']:8.2f} {row['handled']:8.2f}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(), "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
