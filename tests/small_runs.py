"""Whole runs of any method in this process, on tiny models, and what a test wants to know of them."""

from __future__ import annotations

import copy
import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from safetensors.torch import load_file
from transformers import BertModel

import fedlora
from fedlora.adapters import AdaptedModel
from fedlora.adapters.layers import adapter_dtype
from fedlora.adapters.model import linear_shape
from fedlora.arrays import Arrays, padded
from fedlora.clients import held, resources
from fedlora.communication.wire import decode, encode, wire_dtype
from fedlora.config import Config, load_config
from fedlora.data.tokens import FederatedData
from fedlora.errors import InputError
from fedlora.roles import kind_of
from fedlora.strategies.base import FederatedStrategy, get_strategy
from fedlora.strategies.callbacks import Progress
from fedlora.strategies.server_app import resolve
from fedlora.strategies.updates import Update, Updates
from fedlora.training import cohort
from tests import tiny
from tests.bare_runs import bare_runs
from tests.messages import FIRST_NODE

CLIENTS = {"ann": 6, "bob": 3, "cy": 8, "dee": 5}
"""Examples by client: uneven, so that weights are."""

ROUNDS = 3
KINDS = {"bert": "sequence-classification", "llama": "causal-lm"}
"""Task by model. A method is tried on those that it does not refuse."""

TARGETS = r".*(query|q_proj|intermediate\.dense|up_proj)"
"""Square layers, and some that are not."""

OUTPUTS = ("adapter", "experts", "mixture")


@dataclass
class Watched:
    """What a run showed to its server.

    Attributes
    ----------
    folder : Path
    config : Config
        Resolved.
    errors : list of float
        By round that counted: how far the server's model is from the mean of its clients' models, relative to the
        largest number; 0 where all that clients sent is in it as it came.
    logits : Tensor
        Of the server's final model, on the test examples.
    batch : dict of str to Tensor
        Those examples.
    sampled : list of list of int
        Clients by round.
    per_example : list of set of str
        By private training of a client or cohort: the kinds of what it trained, all with per-example gradients.
    """

    folder: Path
    config: Config
    errors: list[float] = field(default_factory=list)
    logits: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    batch: dict[str, torch.Tensor] = field(default_factory=dict)
    sampled: list[list[int]] = field(default_factory=list)
    per_example: list[set[str]] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a CSV file, numbers as numbers."""
        with (self.folder / name).open(newline="") as stream:
            return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(stream)]

    def lines(self) -> list[dict[str, Any]]:
        """rounds.jsonl, without what depends on the time."""
        text = (self.folder / "rounds.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "drift")} for line in text]

    def arrays(self) -> Arrays:
        """Return all arrays of the result, by file and name."""
        files = [f for name in OUTPUTS for f in sorted((self.folder / name).rglob("*.safetensors"))]
        return {
            f"{file.relative_to(self.folder)}/{name}": array
            for file in files
            for name, array in load_file(file).items()
        }

    def seen(self) -> Any:
        """Return what a changed option may change: the result, its scores, and what travelled."""
        arrays = {name: (tuple(a.shape), a.numpy().tobytes()) for name, a in self.arrays().items()}
        return arrays, [line["metrics"] for line in self.lines()], self.rows("communication.csv")


class StoppedError(Exception):
    """Ends a run after a round."""


class World:
    """Models and examples in a folder, and the runs on them; equal runs are run once.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[str, Watched] = {}
        self._folders = itertools.count()
        torch.manual_seed(0)
        bert = BertModel(tiny.bert_config())
        with torch.no_grad():
            for parameter in bert.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)  # wide enough for gradients of some size
        bert.save_pretrained(folder / "bert")
        tiny.save_tokenizer(folder / "bert")
        tiny.save_llama(folder / "llama")
        rng = np.random.default_rng(0)
        for name, counts in (("train", CLIENTS), ("test", dict.fromkeys(CLIENTS, 2)), ("public", {"ann": 6})):
            rows = [
                {
                    "text": " ".join(f"w{word}" for word in rng.integers(4, 50, rng.integers(3, 9))),
                    "label": number % 3,
                    "owner": owner,
                }
                for owner, count in counts.items()
                for number in range(count)
            ]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def content(self, method: str, kind: str, /, **sections: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config of a method on a model; ``client={...}`` and the like add to its sections."""
        files = {name: str(self.folder / f"{name}.jsonl") for name in ("train", "test", "public")}
        content: dict[str, Any] = {
            "run": {"seed": 19, "rounds": ROUNDS},
            "model": {"name": str(self.folder / kind), "task": KINDS[kind], "max_length": 10},
            "data": {
                "name": files["train"],
                "test": files["test"],
                "public": files["public"],
                "partition": {"kind": "natural", "column": "owner"},
            },
            "method": {"name": method, "rank": 2, "alpha": 3.0, "target_modules": TARGETS},
            "client": {"batch_size": 4, "local_steps": 2, "optimizer": "sgd"},
            "simulation": {"workers": 0},
        }
        for section, values in sections.items():
            content[section] = {**content.get(section, {}), **values}
        return content

    def kinds(self, method: str) -> list[str]:
        """Return the models that a method does not refuse."""
        found = []
        for kind in KINDS:
            try:
                load_config(self.content(method, kind))
            except InputError as error:
                if error.field != "model.task":
                    raise
            else:
                found.append(kind)
        return found

    def run(self, content: Mapping[str, Any], *, stops: Sequence[int] = (), uncounted: Sequence[int] = ()) -> Watched:
        """Run a config.

        Parameters
        ----------
        content : mapping
        stops : sequence of int
            Rounds after which the run is stopped, and resumed by processes that know nothing of it.
        uncounted : sequence of int
            Rounds of which the server makes nothing.
        """
        key = json.dumps([content, list(stops), list(uncounted)])
        if key not in self._runs:
            self._runs[key] = self._run(content, stops, uncounted)
        return self._runs[key]

    def _run(self, content: Mapping[str, Any], stops: Sequence[int], uncounted: Sequence[int]) -> Watched:
        config = resolve(load_config(content))
        found = Watched(self.folder / "runs" / str(next(self._folders)), config)
        strategy = watching(get_strategy(config.method.name), found, uncounted)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cohort, "check_grad_samples", _noting(found, cohort.check_grad_samples))
            self._simulate(copy.deepcopy(dict(content)), found, strategy, stops)
        return found

    def _simulate(self, content: dict[str, Any], found: Watched, strategy: Any, stops: Sequence[int]) -> None:
        forget()
        for stop in stops:

            def end(line: dict[str, Any], stop: int = stop) -> None:
                if line["round"] == stop:
                    raise StoppedError

            with pytest.raises(StoppedError):
                fedlora.simulate(
                    content,
                    output=found.folder,
                    strategy=strategy,
                    progress=Progress(on_round=end),
                    resume=found.folder.exists(),
                )
            forget()
        fedlora.simulate(content, output=found.folder, strategy=strategy, resume=found.folder.exists())


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """Make a world with a cache of its own, in which nobody draws pictures."""
    with bare_runs() as patch:
        patch.setenv("FEDLORA_CACHE", str(folder / "cache"))
        yield World(folder)


def forget() -> None:
    """Let clients be new processes: what they keep in memory is gone."""
    resources.forget_model()
    held.part_arrays.cache_clear()
    held._chains.clear()


def _noting(found: Watched, check: Callable[[AdaptedModel, int], None]) -> Callable[[AdaptedModel, int], None]:
    """Note what has per-example gradients, after the guard that looks at them; nothing else may have a gradient."""

    def noted(adapted: AdaptedModel, rows: int) -> None:
        check(adapted, rows)
        moving = {id(p) for p in adapted.model.parameters() if p.requires_grad}
        assert moving == {id(p) for p in adapted.parameters()}
        found.per_example.append({kind_of(name, adapted.head_names) for name in adapted.trained})

    return noted


def watching(method: type[FederatedStrategy], found: Watched, uncounted: Sequence[int]) -> Any:
    """Return what makes a strategy of a method that notes what it sees."""

    class Watching(method):  # type: ignore[misc, valid-type]
        """The method, watched."""

        adapted: AdaptedModel
        expected: Arrays | None = None

        def evaluate(self, adapted: AdaptedModel, data: FederatedData, server_round: int) -> dict[str, Any]:
            self.adapted = adapted
            metrics: dict[str, Any] = super().evaluate(adapted, data, server_round)
            return metrics

        def aggregate(self, updates: Updates) -> Arrays | None:
            seen: list[Update] = []

            def noted() -> Iterator[Update]:
                for update in updates:
                    seen.append(update)
                    yield update

            result: Arrays | None = super().aggregate(Updates(noted()))
            # A resumed run knows its model from its next evaluation on.
            if hasattr(self, "adapted"):
                self.expected = self._mean_model(seen)
                if self.expected is None and result is not None:
                    found.errors.append(_lost(seen, result))
            found.sampled.append(list(self.report.clients))
            return None if len(found.sampled) in uncounted else result

        def _mean_model(self, seen: list[Update]) -> Arrays | None:
            """Return the weighted mean of the clients' models; None where the server's has no adapted layers."""
            if not self.adapted.adapters:
                return None
            total = sum(update.weight for update in seen)
            if any(self.client_blocks(update.client) for update in seen):
                return self._moved_model(seen, total)
            mean: Arrays = {}
            for update in seen:
                moved = {name for name in update.arrays if self.role(name).up == "update"}
                arrays = {n: a + self.arrays[n] if n in moved else a for n, a in update.arrays.items()}
                self.adapted.set_shared(self.arrays | arrays)
                for name, weight in weights(self.adapted).items():
                    part = weight * (update.weight / total)
                    mean[name] = mean[name] + part if name in mean else part
            self.adapted.set_shared(self.arrays)
            return mean

        def _moved_model(self, seen: list[Update], total: float) -> Arrays:
            """Return the model, moved by the weighted mean of the clients' moves; a block has zeros around it."""

            def model(arrays: Arrays) -> Arrays:
                whole = {n: padded(a, self.arrays[n].shape) for n, a in arrays.items()}
                self.adapted.set_shared(self.arrays | whole)
                return weights(self.adapted)

            found = model(self.arrays)
            for update in seen:
                before, after = model(self.sent_to(update.client)), model(update.arrays)
                share = update.weight / total
                found = {name: array + share * (after[name] - before[name]) for name, array in found.items()}
            self.adapted.set_shared(self.arrays)
            return found

        def refine(self, adapted: AdaptedModel, data: FederatedData, server_round: int) -> Arrays | None:
            if self.expected is not None and len(found.sampled) not in uncounted:
                got = weights(adapted)
                largest = max(float(array.abs().max()) for array in got.values())
                found.errors.append(tiny.difference(got, self.expected) / largest)
            refined: Arrays | None = super().refine(adapted, data, server_round)
            return refined

        def export(self, adapted: AdaptedModel, data: FederatedData, folder: Path) -> None:
            super().export(adapted, data, folder)
            found.batch = data.test.batch(np.arange(len(data.test)))
            found.logits = logits(adapted, found.batch)

    return Watching


def weights(adapted: AdaptedModel) -> Arrays:
    """Return what the model is in effect: each adapted layer's whole weight, and the head."""
    adapted.model.eval()
    adapted.layout.set_rows([1])
    found = dict(adapted.arrays(adapted.head_names))
    with torch.no_grad():
        for path, adapter in adapted.adapters.items():
            eye = torch.eye(linear_shape(adapter.base)[1], dtype=adapter_dtype(adapter.base))
            bias = 0 if adapter.bias is None else adapter.bias
            found[path] = (adapter(eye[None])[0] - bias).T
    return {name: array.double() for name, array in found.items()}


def logits(adapted: AdaptedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Run the server's model."""
    adapted.model.eval()
    adapted.layout.set_rows([len(batch["input_ids"])])
    with torch.no_grad():
        return adapted.logits(batch)


def _lost(seen: list[Update], result: Arrays) -> float:
    """Return 0 if every array that a client sent is among the server's."""
    for update in seen:
        for name, array in update.arrays.items():
            if not any(full.endswith(name) and torch.equal(kept, array) for full, kept in result.items()):
                return 1.0
    return 0.0


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


class DrawnRounds:
    """A method's server half on a tiny model; its clients answer with drawn numbers.

    Parameters
    ----------
    method : str
    kind : str
        Of the model, as :mod:`tests.tiny` names them.
    dtype : str
    **options
        Keys of ``[method]``.

    Attributes
    ----------
    arrays : dict of str to Tensor
        The global arrays that rounds change, as the server sends them.
    """

    def __init__(self, method: str, kind: str = "bert", dtype: str = "float64", **options: Any) -> None:
        chosen = {"name": method, "rank": 3, "alpha": 4.5, "target_modules": "all-linear", **options}
        self.config = resolve(tiny.settings(kind, model={"dtype": dtype}, run={"rounds": 5}, method=chosen))
        self.strategy = get_strategy(method)(self.config)
        self.adapted = self.strategy.adapt(tiny.base_model(kind, getattr(torch, dtype)), self.config)
        self.strategy.know(self.adapted)
        self.strategy.nodes = {client: FIRST_NODE + client for client in range(len(WEIGHTS))}
        no_data: Any = None
        start = self.strategy.start_arrays(self.adapted, no_data) | self.adapted.arrays(self.adapted.head_names)
        self.dtype = wire_dtype(dtype)
        self.arrays = decode(encode(start, self.dtype))
        self._generator = torch.Generator().manual_seed(0)

    def round(self, server_round: int, answering: Sequence[int] | None = None) -> tuple[list[Arrays], Arrays]:
        """Return what each client sent, and what the server made of it; an increment is no part of the next round's."""
        changing = {n: a for n, a in self.arrays.items() if self.strategy.kind(n) in self.strategy.changing()}
        no_grid: Any = None
        messages = list(
            self.strategy.configure_train(server_round, encode(changing, self.dtype), ConfigRecord(), no_grid)
        )
        sent: list[Arrays] = []
        replies = []
        for client, message in enumerate(messages):
            if answering is not None and client not in answering:
                continue
            shapes = self.strategy.client_shapes(client)
            drawn = {n: torch.randn(s, generator=self._generator, dtype=torch.float64) for n, s in shapes.items()}
            record = encode(drawn, self.dtype)
            sent.append(decode(record))
            content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": WEIGHTS[client]})})
            reply = Message(content, reply_to=message)
            reply.metadata.group_id = message.metadata.group_id
            replies.append(reply)
        record, _ = self.strategy.aggregate_train(server_round, replies)
        assert record is not None
        result = decode(record)
        self.arrays |= {name: array for name, array in result.items() if name in self.arrays}
        return sent, result


WEIGHTS = (7, 2, 4)
"""Examples of the clients that answer with drawn numbers."""
