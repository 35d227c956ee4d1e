"""Compare the results of short runs, bit for bit, between this checkout and another commit of it.

    python -m tests.golden                                        # against the commit in tests/golden/REFERENCE
    python -m tests.golden --against REVISION --only ffa-lora fed-sb

Each case is one run on the CPU. What is compared: every array of the result, the columns of privacy.csv, and the
payload and formula columns of communication.csv. Bits hold within one machine only, so both commits are run here, side
by side. It exits with 1 where anything differs.

A commit that changes bits on purpose is followed by one that writes its id to REFERENCE and says what changed and why.
"""

from __future__ import annotations

import _thread
import argparse
import csv
import hashlib
import importlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REFERENCE = Path(__file__).with_name("REFERENCE")

_SHORT = {
    "run.rounds": 2,
    "client.local_steps": 2,
    "client.batch_size": 8,
    "data.partition.clients": 3,
    "data.max_examples": 300,
    "data.max_test_examples": 32,
    "model.max_length": 32,
    "model.num_hidden_layers": 2,
    "simulation.workers": 0,
}
_EXPERTS = {
    "run.rounds": 1,
    "client.local_steps": 2,
    "data.max_test_examples": 8,
    "data.max_examples": 100,
    "model.max_length": 16,
    "model.num_hidden_layers": 1,
    "simulation.workers": 0,
}
_OPEN = {"privacy.mode": "none"}
# Noise that is given is not searched for, which takes seconds; the cases of quickstart search.
_PRIVATE = {"privacy.mode": "example", "privacy.noise_multiplier": 1.0}
_RANKS = {"east": 4, "north": "full", "west": 2}


@dataclass
class Case:
    """A run: a config of experiments/, what is overridden, and how it runs.

    Attributes
    ----------
    config : str
        Name of the file, without its ending.
    overrides : dict
    resumed : bool
        Whether it is stopped after its first round and resumed.
    nodes : bool
        Whether its clients are three real nodes instead of simulated ones.
    """

    config: str
    overrides: dict[str, Any] = field(default_factory=dict)
    resumed: bool = False
    nodes: bool = False


CASES = {
    "fed-sb": Case("quickstart", _SHORT),
    "fed-sb-open": Case("quickstart", _SHORT | _OPEN),
    "fed-sb-resumed": Case("quickstart", _SHORT | {"run.rounds": 3}, resumed=True),
    "ffa-lora": Case("quickstart", _SHORT | {"method.name": "ffa-lora"}),
    "ffa-lora-resumed": Case("quickstart", _SHORT | _OPEN | {"method.name": "ffa-lora", "run.rounds": 3}, resumed=True),
    "ffa-lora-nodes": Case("quickstart", _SHORT | _OPEN | {"method.name": "ffa-lora"}, nodes=True),
    "fedit": Case("quickstart", _SHORT | {"method.name": "fedit"}),
    "fedit-open": Case("quickstart", _SHORT | _OPEN | {"method.name": "fedit"}),
    "fedit-workers": Case("quickstart", _SHORT | {"method.name": "fedit", "simulation.workers": 2}),
    "flexmore": Case("flexmore", _EXPERTS),
    "flexmore-private": Case("flexmore", _EXPERTS | _PRIVATE | {"run.rounds": 2}, resumed=True),
    "flexmore-nodes": Case("flexmore", _EXPERTS | {"run.rounds": 2, "method.ranks": _RANKS}, nodes=True),
    "smollm2": Case("smollm2", _EXPERTS | {"run.rounds": 2}),
    "smollm2-private": Case("smollm2", _EXPERTS | _PRIVATE | {"method.name": "fedit"}),
}
SLOW = ("fedit-workers",)
"""Cases that run only if they are named: the tests hold elsewhere that bits do not depend on the number of workers."""


# One commit's half, in a process of its own. It uses what users touch, since the rest may differ between commits.


def digests(case: Case, tree: Path, folder: Path) -> dict[str, str]:
    """Run a case with a tree's configs, into ``folder``, and return a digest of each of its results."""
    from fedlora import simulate

    config, output = tree / "experiments" / f"{case.config}.toml", folder / "run"
    if case.nodes:
        run_on_nodes(tree, config, case.overrides, folder)
    elif case.resumed:
        with interrupted_after_a_round(output):
            simulate(config, case.overrides, output=output)
        simulate(config, case.overrides, output=output, resume=True)
    else:
        simulate(config, case.overrides, output=output)
    found = {}
    for path in sorted(output.rglob("*.safetensors")):
        found |= {f"{path.relative_to(output)}:{array}": digest for array, digest in _arrays(path)}
    privacy = ("round", "client", "steps", "sample_rate", "noise_multiplier", "epsilon", "delta")
    sizes = ("round", "client", "direction", "payload_bytes", "formula_bytes")
    for name, columns in (("privacy.csv", privacy), ("communication.csv", sizes)):
        if (output / name).exists():
            with (output / name).open(newline="") as file:
                rows = list(csv.DictReader(file))
            found |= {f"{name}:{column}": _digest([row[column] for row in rows]) for column in columns}
    return found


@contextmanager
def interrupted_after_a_round(output: Path) -> Iterator[None]:
    """Press Ctrl-C once the run in a folder has recorded a round; fail if the run ends before."""
    ended = threading.Event()

    def watch() -> None:
        rounds = output / "rounds.jsonl"
        while not ended.wait(0.002):
            if rounds.exists() and b"\n" in rounds.read_bytes():
                return _thread.interrupt_main()

    watcher = threading.Thread(target=watch)
    # Shells let what runs in the background ignore Ctrl-C, and children inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        return
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGINT, handler)
    raise RuntimeError("the run ended before it was interrupted")


def run_on_nodes(tree: Path, config: Path, overrides: dict[str, Any], folder: Path) -> None:
    """Run the app's two halves as Flower would on three real nodes, in this process and without a network."""
    import tomllib

    import tomli_w
    from flwr.app import Context, RecordDict

    content = tomllib.loads(config.read_text(encoding="utf-8"))
    for key, value in overrides.items():
        section, _, rest = key.partition(".")
        if rest in ("max_examples", "max_test_examples") or rest.startswith("partition"):
            continue
        content.setdefault(section, {})[rest] = value
    if "ranks" in content["method"]:
        content["method"].pop("rank", None)
    classify = content["model"]["task"] == "sequence-classification"
    content["data"] = {"name": "nodes", "test": str(_write_rows(folder / "test.csv", 9, 16, classify))}
    content["server"] = {"timeout": 120.0, "min_replies": 3}
    components = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"][
        "components"
    ]
    # The node's ClientApp passes messages on to a process that stays; here the app behind it answers.
    passes_on = importlib.import_module(components["clientapp"].partition(":")[0])
    client_app, server_app = _load(passes_on.APP), _load(components["serverapp"])
    run = {"config": tomli_w.dumps(content), "output": str(folder / "run")}
    contexts = {}
    for number, name in enumerate(("east", "north", "west")):
        home = folder / name
        home.mkdir()
        _write_rows(home / "own.csv", number, 40 + number, classify)
        node = {
            "name": name,
            "superlink": {"address": "127.0.0.1:1"},
            "data": {"path": "own.csv"},
            "policy": {"allow_non_private": True},
            "worker": {"threads": 1, "device": "cpu"},
            "state": {"directory": "state", "cache": str(folder / "cache")},
        }
        (home / "node.toml").write_text(tomli_w.dumps(node), encoding="utf-8")
        contexts[100 + number] = Context(
            run_id=1,
            node_id=100 + number,
            node_config={"node-file": str(home / "node.toml")},
            state=RecordDict(),
            run_config={"config": run["config"]},
        )
    server_app(_nodes_grid(client_app, contexts), Context(1, 0, {}, RecordDict(), run))


def _write_rows(path: Path, seed: int, count: int, classify: bool) -> Path:
    draw = random.Random(seed)
    words = {"bad": ["dull", "waste", "lifeless", "mess"], "good": ["joy", "fine", "moving", "bright"]}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"] if classify else ["text", "domain"])
        for row in range(count):
            label = ("bad", "good")[row % 2]
            text = " ".join(draw.choice([*words[label], "a", "tale", "of", "people", "film"]) for _ in range(12))
            writer.writerow([text, label if classify else ("east", "north", "west")[row % 3]])
    return path


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _nodes_grid(client_app: Any, contexts: dict[int, Any]) -> Any:
    """Return a Grid whose nodes answer in this process, one after the other."""
    from flwr.app import Message
    from flwr.serverapp import Grid
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    # A Message cannot be made without it.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    class NodesGrid(Grid):
        def __init__(self) -> None:
            self._replies: dict[str, Message] = {}

        def set_run(self, run: Run) -> None:
            pass

        @property
        def run(self) -> Run:
            return Run.create_empty(1)

        def create_message(
            self, content: Any, message_type: str, dst_node_id: int, group_id: str, ttl: Any = None
        ) -> Any:
            return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

        def get_node_ids(self) -> Iterable[int]:
            return list(contexts)

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            ids = []
            for message in messages:
                ids.append(f"{message.metadata.dst_node_id}-{time.monotonic_ns()}")
                message.metadata.__dict__["_message_id"] = ids[-1]
                reply = client_app(message, contexts[message.metadata.dst_node_id])
                if reply.has_error():
                    raise RuntimeError(f"node {message.metadata.dst_node_id}: {reply.error}")
                self._replies[ids[-1]] = reply
            return ids

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [self._replies.pop(one) for one in message_ids if one in self._replies]

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            return self.pull_messages(self.push_messages(messages))

    return NodesGrid()


def _arrays(path: Path) -> list[tuple[str, str]]:
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except (TypeError, KeyError):  # bfloat16, which numpy lacks
        return [("", hashlib.sha256(path.read_bytes()).hexdigest()[:16])]
    content = {name: f"{a.dtype}{a.shape}".encode() + a.tobytes() for name, a in sorted(arrays.items())}
    return [(name, hashlib.sha256(data).hexdigest()[:16]) for name, data in content.items()]


def _digest(values: list[str]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def run_half(tree: Path, cases: list[str], results: Path) -> None:
    """Run cases with the code of a tree; append a line of JSON each to ``results``."""
    logging.disable(logging.WARNING)
    for name in cases:
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = digests(CASES[name], tree, Path(folder))
            except Exception:
                found = {"error": traceback.format_exc()}
        line = {"case": name, "digests": found, "seconds": time.process_time() - began}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")


# Both halves.


def start_half(tree: Path, cases: list[str], results: Path) -> subprocess.Popen[bytes]:
    """Start the cases with the code of a tree; this file is the same for both."""
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), "--tree", str(tree), "--results", str(results), "--only", *cases]
    with results.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, cwd=tree, env=environment, stdout=log, stderr=log)


def compare(revision: str, cases: list[str]) -> bool:
    """Print for each case whether both commits give the same; return whether all do."""
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch) / "other"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(other), revision], check=True)
        files = Path(scratch) / "before.jsonl", Path(scratch) / "after.jsonl"
        halves = [start_half(tree, cases, file) for tree, file in zip((other, ROOT), files, strict=True)]
        try:
            for half, file in zip(halves, files, strict=True):
                if half.wait():
                    print(file.with_suffix(".log").read_text(errors="replace")[-3000:], file=sys.stderr)
                    return False
        finally:
            for half in halves:
                half.kill()
                half.wait()
            subprocess.run([*git, "remove", "--force", str(other)], check=True)
        lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return all([_same(before, after) for before, after in zip(*lines, strict=True)])


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    before, after = first["digests"], second["digests"]
    different = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    failed = "error" in before or "error" in after or not after
    verdict = "FAILED" if failed else "DIFFERENT" if different else "equal"
    seconds = f"{first['seconds']:.0f} and {second['seconds']:.0f} s of CPU"
    print(f"{second['case']}: {verdict} ({len(after)} digests, {seconds})")
    for name in different[:5]:
        print(f"    {name}: {before.get(name)} -> {after.get(name)}")
    return not failed and not different


def known(revision: str) -> bool:
    """Return whether this clone has a commit."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0


def main() -> None:
    """Read the arguments; run one half, or compare both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="a commit, branch or tag; by default the commit in tests/golden/REFERENCE")
    parser.add_argument("--only", nargs="*", choices=CASES, default=[name for name in CASES if name not in SLOW])
    for internal in ("--tree", "--results"):
        parser.add_argument(internal, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tree:
        return run_half(arguments.tree, arguments.only, arguments.results)
    revision = arguments.against or REFERENCE.read_text(encoding="utf-8").strip()
    if not known(revision):
        sys.exit(f"{revision}: this clone does not have that commit; fetch the whole history: git fetch --unshallow")
    sys.exit(0 if compare(revision, arguments.only) else 1)


if __name__ == "__main__":
    main()
