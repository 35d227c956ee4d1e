"""A data owner's node for tests, and the server's half of a conversation with it; no SuperLink, no socket."""

from __future__ import annotations

import csv
import random
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tomli_w
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedlora.communication.broadcast import HELD
from fedlora.communication.parts import INITIAL
from fedlora.communication.wire import decode, digest, encode
from fedlora.config import ClientSection, Config, DataSection, PrivacySection, load_config
from fedlora.data.tokens import prepare_data
from fedlora.errors import ClientErrorCode
from fedlora.flower import set_run_id
from fedlora.models import load_base
from fedlora.node.names import NODE_FILE, NODE_RECORD
from fedlora.node.outward_errors import is_outward
from fedlora.node.policy import folder_digest
from fedlora.strategies.base import get_strategy
from fedlora.strategies.server_app import resolve
from tests.messages import FIRST_NODE, train_message

WORDS = {"good": ["joy", "fine", "moving", "bright"], "bad": ["dull", "waste", "lifeless", "mess"]}
LABELS = ["bad", "good"]
RUN = 11


def reviews(count: int = 60, seed: int = 0) -> list[dict[str, str]]:
    """Draw labelled texts."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = LABELS[number % 2]
        rows.append({"note": f"a {draw.choice(WORDS[label])} tale {number}", "verdict": label})
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows with their keys as columns."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_node(folder: Path, cache: Path, rows: list[dict[str, str]] | None = None, **sections: Any) -> Path:
    """Write a node.toml and its data; ``policy={...}`` and the like add to the sections."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "notes.csv", rows or reviews())
    content: dict[str, Any] = {
        "name": "clinic",
        "superlink": {"address": "127.0.0.1:8000"},
        "data": {"path": "notes.csv", "text": "note", "label": "verdict"},
        "policy": {"max_epsilon": 8.0, "delta": 1e-3},
        "worker": {"threads": 1, "device": "cpu"},
        "state": {"directory": "state", "cache": str(cache)},
    }
    for section, values in sections.items():
        content[section] = {**content[section], **values} if isinstance(values, dict) else values
    path = folder / "node.toml"
    path.write_text(tomli_w.dumps(content), encoding="utf-8")
    return path


def listed(*folders: Path | str) -> list[dict[str, str]]:
    """Return the entries of models for an owner's ``[policy] models``."""
    return [{"name": str(folder), "sha256": folder_digest(Path(folder))} for folder in folders]


@lru_cache
def _start(config_text: str) -> tuple[ArrayRecord, ArrayRecord]:
    """Return the frozen and the trained arrays with which a run of the config starts."""
    config = Config.from_toml(config_text)
    strategy = get_strategy(config.method.name)(config)
    labels = LABELS if config.model.task == "sequence-classification" else None
    adapted = strategy.adapt(load_base(config, labels), config)
    strategy.know(adapted)
    nothing: Any = SimpleNamespace(public=None)  # these starts read no examples
    start = strategy.start_arrays(adapted, nothing) | adapted.arrays(adapted.head_names)
    changing = set(adapted.names(strategy.changing()))
    frozen = encode({name: array for name, array in start.items() if name not in changing})
    return frozen, encode({name: array for name, array in start.items() if name in changing})


class Server:
    """Makes the messages that a server would send to one node.

    Parameters
    ----------
    folder : Path
        For the server's test set.
    method : str
    run : int
        The SuperLink's id of the run.
    federation : str
    known : str
        What the test texts begin with: words that the model's tokenizer knows.
    overrides : dict
        ``section__key`` to value.
    """

    def __init__(
        self,
        folder: Path,
        method: str = "fed-sb",
        run: int = RUN,
        federation: str = "f1",
        known: str = "",
        **overrides: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        words = known.split() or [""]
        rows = [
            {"text": f"{known} {words[number % len(words)]} {row['note']}", "label": row["verdict"]}
            for number, row in enumerate(reviews(20, 9))
        ]
        content = {
            "run": {"rounds": 4, "seed": 3},
            "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 16, "num_hidden_layers": 1},
            "data": {"name": "nodes", "test": str(write_csv(folder / "test.csv", rows))},
            "method": {"name": method, "rank": 4},
            "client": {"optimizer": "sgd", "batch_size": 12, "local_steps": 3},
            "privacy": {"mode": "example", "target_epsilon": 4.0, "target_delta": 1e-3},
        }
        given = {key.replace("__", "."): value for key, value in overrides.items()}
        self.config: Config = resolve(load_config(content, given))
        self.run, self.federation = run, federation
        self.data = prepare_data(self.config)
        same = self.config.model_copy(update={"privacy": PrivacySection(), "client": ClientSection()})
        same = same.model_copy(update={"data": DataSection(name="nodes", test="test")})
        self.frozen, self.arrays = _start(same.to_toml())

    def context(self, node_file: Path | str, run: int | None = None) -> Context:
        """Make what Flower's runtime gives to the app on the node."""
        return Context(
            run_id=self.run if run is None else run,
            node_id=FIRST_NODE,
            node_config={NODE_FILE: str(node_file)},
            state=RecordDict(),
            run_config={"config": self.config.to_toml()},
        )

    def describe(self, label_names: list[str] | None = None) -> Message:
        """Make the query with which a run begins."""
        about = ConfigRecord({"federation": self.federation, "label-names": label_names or self.data.label_names or []})
        return self._of_run(Message(RecordDict({NODE_RECORD: about}), FIRST_NODE, "query", group_id="0"))

    def train(self, server_round: int, *, client: int = 0, initial: bool = True) -> Message:
        """Make a training message, with the frozen arrays unless told otherwise."""
        settings = {"server-round": server_round, "learning-rate": 0.1, "rank": str(self.config.method.rank)}
        content: dict[str, Any] = {
            "arrays": self.arrays,
            "config": ConfigRecord(settings),
            NODE_RECORD: ConfigRecord({"federation": self.federation, "client": client}),
        }
        if len(self.frozen):
            content[HELD] = ConfigRecord({INITIAL: digest(decode(self.frozen))})
            if initial:
                content[INITIAL] = self.frozen
        return self._of_run(train_message(FIRST_NODE, RecordDict(content), server_round))

    def _of_run(self, message: Message) -> Message:
        set_run_id(message, self.run)
        return message


def refused(reply: Message, code: ClientErrorCode) -> str:
    """Check an error that leaves a node, and return its reason."""
    assert reply.has_error(), reply.content
    assert reply.error.code == code
    assert is_outward(reply.error.reason)
    return str(reply.error.reason)
