"""What a server can learn from a node's replies: n, the labels, and nothing of the texts, whatever it sends."""

from __future__ import annotations

import csv
import json
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from fedlora.clients import client_app
from fedlora.clients.client_app import app
from fedlora.communication.broadcast import AFTER, HELD, KEY
from fedlora.communication.parts import INITIAL
from fedlora.communication.wire import digest, encode
from fedlora.errors import ClientErrorCode, InputError
from fedlora.node import node_ledger
from fedlora.node.local_node import LocalNode
from fedlora.node.names import NODE_FILE, NODE_RECORD
from tests import tiny
from tests.messages import FIRST_NODE, train_message
from tests.owner import LABELS, listed, write_node

ROWS = 24
PLAIN = [f"w{4 + row} w7 w{9 + row % 5}" for row in range(ROWS)]
ODD = [
    "", " ", "4711", "patient hiv 4711", "w5 " * 20_000, "x" * 100_000, "w5", "0", "1e999", "nan", "NA", "-", '"', "'",
    "=1+1", "a,b;c\td", "two\nlines", "\u202eright to left", "\U0001f600" * 50, "\x01\x7f", "e\u0301", "\ufeff",
    "<pad>", "</s> [CLS] w8",
]  # fmt: skip
HALVES = ["\ud800", "w4 \udfff w5", *ODD[2:]]
assert len(ODD) == len(HALVES) == ROWS


def tokenizer(folder: Path, words: int, unknown: str | None) -> None:
    """Save a tokenizer of w4, w5, ...; without an unknown token it fails on any other word."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, words)}}
    made = Tokenizer(models.WordLevel(vocabulary, **({"unk_token": unknown} if unknown else {})))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special, unk_token=unknown).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that an owner may list: one like any other, and one whose tokenizer fails or knows too many words."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: folder / name for name in ("decoder", "encoder", "fails", "beyond", "stranger")}
    for name in ("decoder", "fails", "beyond", "stranger"):
        tiny.save_llama(made[name])
    torch.manual_seed(0)
    BertForSequenceClassification(tiny.bert_config()).save_pretrained(made["encoder"])
    tokenizer(made["encoder"], tiny.VOCABULARY, "<unk>")
    tokenizer(made["fails"], tiny.VOCABULARY, None)
    tokenizer(made["beyond"], 2 * tiny.VOCABULARY, "<unk>")
    return made


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    # No power goes here, and a thousand messages flush the disk some ten thousand times.
    monkeypatch.setattr(node_ledger, "_SYNCHRONOUS", "OFF")
    yield
    client_app.forget_data()


def write_file(path: Path, texts: list[Any], prompt: bool) -> None:
    """Write texts with the labels bad, good, bad, ...; or as questions, with the same texts reversed as answers."""
    names = ("note", "verdict") if not prompt else ("question", "answer")
    other = [LABELS[row % 2] for row in range(len(texts))] if not prompt else texts[::-1]
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([names, *zip(texts, other, strict=True)])
    elif path.suffix == ".jsonl":
        rows = [dict(zip(names, row, strict=True)) for row in zip(texts, other, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.table(dict(zip(names, (pa.array(texts), pa.array(other)), strict=True))), path)


def nodes(
    folder: Path,
    folders: dict[str, Path],
    suffix: str,
    texts: tuple[list[Any], list[Any]],
    prompt: bool = False,
    **policy: Any,
) -> list[Path]:
    """Make two nodes that differ in their texts alone."""
    own = [folders[name] for name in ("decoder", "encoder", "fails", "beyond")]
    rules = {"max_epsilon": 60.0, "max_describes_per_day": 10_000, "models": listed(*own), **policy}
    columns = {"prompt": "question", "answer": "answer", "text": "question"} if prompt else {}
    made = []
    for number, own_texts in enumerate(texts):
        path = write_node(
            folder / str(number), folder / f"cache{number}", policy=rules, data={"path": f"own.{suffix}", **columns}
        )
        write_file(path.parent / f"own.{suffix}", own_texts, prompt)
        made.append(path)
    return made


def told(reply: Message) -> Any:
    """Return all that a reply tells, but for the noised numbers and the clock."""
    if reply.has_error():
        return reply.error.code, reply.error.reason
    found = {}
    for name, record in reply.content.items():
        if isinstance(record, ArrayRecord):
            found[name] = [(key, array.dtype, array.shape, len(array.data)) for key, array in record.items()]
        else:
            found[name] = {key: value for key, value in record.items() if key not in ("seconds", "loss")}
    return repr(found)


class Attacker:
    """A server that sends what it likes; the same to both nodes.

    Parameters
    ----------
    names : dict of str to Path
        Models.
    seed : int
    """

    def __init__(self, names: dict[str, Path], seed: int) -> None:
        self.draw, self.names = random.Random(seed), names
        self.parts = random.Random(seed)
        self.run, self.round = 100, 0
        self.described: tuple[str, str] | None = None
        self.frozen = encode({"x": torch.ones(3)})

    def config(self, valid: float) -> str:
        """Draw a config; that share of its keys is left as a sane server has it."""
        draw = self.draw
        classify = draw.random() < 0.5
        content: dict[str, dict[str, Any]] = {
            "run": {"rounds": draw.choice([1, 2, 3]), "seed": draw.choice([0, 1])},
            "model": {
                "name": str(self.names[draw.choice(["encoder"] if classify else ["decoder", "fails", "beyond"])]),
                "task": "sequence-classification" if classify else "causal-lm",
                "max_length": draw.choice([2, 5, 16]),
            },
            "data": {"name": "nodes", "test": "test.csv"},
            "method": {"name": "fedit", "rank": 2},
            "client": {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": draw.choice([4, 12]), "local_steps": 2},
            "privacy": {"mode": "example", "noise_multiplier": 6.0, "target_delta": 1e-3},
        }
        wrong: dict[str, list[Any]] = {
            "run.rounds": [0, 10**6, "x"],
            "run.seed": [-1, 2**62],
            "model.name": [
                str(self.names["stranger"]),
                "/",
                "..",
                "nobody/none",
                "asset:none",
                "asset:20newsgroups",
                "\0",
            ],
            "model.task": ["causal-lm", "sequence-classification", "none"],
            "model.max_length": [1, 33, 10**9],
            "model.revision": ["main", "0" * 40],
            "model.dtype": ["float64", "bfloat16"],
            "model.num_hidden_layers": [1, 99],
            "model.pooling": ["mean"],
            "data.text": ["verdict", "secret"],
            "data.label": ["note", "secret"],
            "data.name": ["/etc/passwd", "asset:rotten-tomatoes"],
            "data.max_examples": [1, 3],
            "data.label_names": [["hiv", "good"], ["one"]],
            "data.partition": [{"kind": "natural", "column": "note"}, {"clients": 7}],
            "method.name": ["none", "flexmore", "fed-sb", "ffa-lora"],
            "method.rank": [10**5, 0],
            "method.target_modules": ["all-linear", "none", "(", ["q_proj"]],
            "client.batch_size": [1, 10**9],
            "client.local_steps": [10**7],
            "client.learning_rate": [1e300, -1.0],
            "privacy.mode": ["none", "client"],
            "privacy.noise_multiplier": [0.0, 0.1],
            "privacy.target_epsilon": [3.0],
            "privacy.target_delta": [0.5],
            "privacy.max_grad_norm": [1e-9, 1e9],
            "simulation.compile": [True],
        }
        for key, values in wrong.items():
            if draw.random() > valid ** (1 / 8):
                section, _, name = key.partition(".")
                content.setdefault(section, {})[name] = draw.choice(values)
        return tomli_w.dumps(content)

    def messages(self, count: int) -> Iterator[tuple[Message, str, int]]:
        """Yield messages, with the config and the run that they come in."""
        for _ in range(count):
            text = self.config(self.draw.choice([0.2, 0.6, 1.0]))
            if self.described is None or self.draw.random() < 0.5:
                yield self.describe(text)
            else:
                yield self.train(text)

    def describe(self, text: str) -> tuple[Message, str, int]:
        draw = self.draw
        self.run += 1
        federation = f"f{self.run}"
        about: dict[str, Any] = {"federation": federation, "label-names": LABELS}
        if draw.random() < 0.3:
            about["label-names"] = draw.choice(
                [[], ["hiv", "good"], ["good", "bad", "x"], ["a"], ["bad"] * 2, 7, ["x" * 200_000, "y"]]
            )
        if draw.random() < 0.1:
            about["federation"] = draw.choice(["", "x" * 500, 7, "f101"])
        if draw.random() < 0.05:
            del about["federation"]
        content = RecordDict({NODE_RECORD: ConfigRecord(about)} if draw.random() < 0.97 else {})
        text = "" if draw.random() < 0.03 else draw.choice(["/etc/passwd", "a = [\n"]) if draw.random() < 0.03 else text
        if "causal-lm" in text and "label-names" in about:
            about.update({"label-names": []})
            content = RecordDict({NODE_RECORD: ConfigRecord(about)})
        self.described, self.round = (text, str(about.get("federation"))), 0
        return self._of_run(Message(content, FIRST_NODE, "query", group_id="0")), text, self.run

    def train(self, text: str) -> tuple[Message, str, int]:
        draw = self.draw
        assert self.described is not None
        text = text if draw.random() < 0.2 else self.described[0]
        self.round += draw.choice([1, 1, 1, 0, -1])
        settings: dict[str, Any] = {
            "server-round": self.round, "learning-rate": 0.1, "rank": "2", "client": 7, "unknown": "x",
        }  # fmt: skip
        held: dict[str, Any] = {}
        if draw.random() < 0.2:
            part = self.parts.choice([INITIAL, INITIAL, "lora_A", "residual"])
            held[part] = draw.choice([digest({"x": torch.ones(3)}), "../../own", "0" * 64])
            if self.parts.random() < 0.3:
                keys = ["../../own", "0" * 64]
                held |= {AFTER + part: self.parts.choice(["", "0" * 64]), KEY + part: self.parts.choice(keys)}
        if draw.random() < 0.1:
            settings |= draw.choice([{"learning-rate": 1e300}, {"rank": "full"}, {"server-round": 10**12}])
        if draw.random() < 0.05:
            del settings[draw.choice(sorted(settings))]
        content: dict[str, Any] = {
            "arrays": encode(self.arrays(text)) if draw.random() < 0.8 else encode({"x": torch.ones(2)}),
            "config": ConfigRecord(settings),
            NODE_RECORD: ConfigRecord({"federation": self.described[1], "client": 0}),
        }
        if draw.random() < 0.1:
            content[self.parts.choice([INITIAL, INITIAL, "initial/lora_A", "changed/residual"])] = self.frozen
        if draw.random() < 0.05:
            del content[draw.choice(sorted(content))]
        if held:
            content[HELD] = ConfigRecord(held)
        return self._of_run(train_message(FIRST_NODE, RecordDict(content), self.round)), text, self.run

    def arrays(self, text: str) -> dict[str, torch.Tensor]:
        """Return the arrays of the run's adapters, as far as the config is sane."""
        layers, classify = 1 if "num_hidden_layers = 1" in text else 2, str(self.names["encoder"]) in text
        made = {}
        for layer in range(layers):
            for name in ("query", "value") if classify else ("q_proj", "v_proj"):
                path = f"bert.encoder.layer.{layer}.attention.self" if classify else f"model.layers.{layer}.self_attn"
                rows = 16 if name == "v_proj" else 32
                made[f"{path}.{name}.lora_A"] = torch.full((2, 32), 0.1)
                made[f"{path}.{name}.lora_B"] = torch.zeros(rows, 2)
        if classify:
            made |= {"classifier.weight": torch.zeros(2, 32), "classifier.bias": torch.zeros(2)}
        return made

    def _of_run(self, message: Message) -> Message:
        message.metadata.__dict__["_run_id"] = self.run
        return message


def ask(node_file: Path, message: Message, text: str, run: int) -> Message:
    where = {NODE_FILE: str(node_file)}
    return app(message, Context(run, FIRST_NODE, where, RecordDict(), {"config": text}))


def attack(files: list[Path], attacker: Attacker, count: int) -> Counter[str]:
    """Send messages to two nodes; both must tell the same. Return how the replies ended."""
    ended: Counter[str] = Counter()
    sent = list(attacker.messages(count))
    # One node after the other, so that a process keeps a node's model from message to message.
    replies = [[ask(path, *each) for each in sent] for path in files]
    for (message, text, _), first, second in zip(sent, *replies, strict=True):
        assert told(first) == told(second), (message, text)
        if message.metadata.message_type == "query" and not first.has_error():
            assert first.content.object_id == second.content.object_id
        kind = message.metadata.message_type
        ended[f"{kind}: {first.error.reason.partition(':')[0]}" if first.has_error() else kind] += 1
    assert LocalNode.open(files[0]).ledger.history() == LocalNode.open(files[1]).ledger.history()
    return ended


def test_a_thousand_messages_tell_nothing_of_the_texts(tmp_path: Path, folders: dict[str, Path]) -> None:
    files = nodes(tmp_path, folders, "csv", (PLAIN, ODD))
    ended = attack(files, Attacker(folders, 0), 1000)
    # The messages reached all of what they are about.
    assert ended["query"] > 100
    assert ended["train"] > 30
    kinds = {kind for kind in ended if ": " in kind}
    assert {"query: InputError", "query: PolicyError", "query: LabelError", "query: BudgetError"} < kinds
    # A run trains with the config that was described, so what is wrong with another is not even told.
    assert {"train: StaleError", "train: ValueError", "train: NeedsInitialError"} < kinds


@pytest.mark.parametrize(
    ("suffix", "prompt", "odd"),
    [
        ("tsv", False, ODD),
        ("csv", False, [str(4711 + row) for row in range(ROWS)]),
        ("csv", True, ODD),
        ("jsonl", True, HALVES),
        ("jsonl", False, [4711, 0.5, True, None, ["w5"], {"w6": 7}, *ODD[6:]]),
        ("parquet", False, [b"\xff\xfe", *(text.encode() for text in ODD[1:])]),
        ("parquet", True, list(range(ROWS))),
    ],
)
def test_other_formats_tell_as_little(
    tmp_path: Path, folders: dict[str, Path], suffix: str, prompt: bool, odd: list[Any]
) -> None:
    files = nodes(tmp_path, folders, suffix, (PLAIN, odd), prompt)
    ended = attack(files, Attacker(folders, 1), 25)
    assert ended["query"] >= 5
    assert ended["train"]


def guess(folder: Path, text: str) -> Path:
    """Make a model whose tokenizer fails where a row begins as a server guesses."""
    tiny.save_llama(folder)
    made = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2, "[yes]": 3}))
    made.pre_tokenizer = pre_tokenizers.Split(text, "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


def query(run: int, labels: list[str]) -> Message:
    about = ConfigRecord({"federation": f"f{run}", "label-names": labels})
    message = Message(RecordDict({NODE_RECORD: about}), FIRST_NODE, "query", group_id="0")
    message.metadata.__dict__["_run_id"] = run
    return message


def a_config(name: object, **sections: dict[str, Any]) -> str:
    content = {
        "model": {"name": str(name), "task": "causal-lm", "max_length": 16},
        "data": {"name": "nodes", "test": "test.csv"},
        "method": {"name": "fedit", "rank": 2},
        "privacy": {"mode": "example", "noise_multiplier": 6.0, "target_delta": 1e-3},
    }
    return tomli_w.dumps({key: {**content.get(key, {}), **sections.get(key, {})} for key in {*content, *sections}})


def test_a_servers_own_tokenizer_reads_no_digit(tmp_path: Path, folders: dict[str, Path]) -> None:
    """The attack that read "patient hiv 4711" from a node's file in 15 questions."""
    files = nodes(tmp_path, folders, "csv", (["patient hiv 4711", *PLAIN[1:]], PLAIN))
    for number, text in enumerate(["patient hiv 4", "patient hiv 5", "w4"]):
        model = guess(tmp_path / f"guess{number}", text)
        for name in (model, model / ".." / model.name, f"{folders['decoder']}/../../{tmp_path.name}/{model.name}"):
            replies = [ask(path, query(number, []), a_config(name), number) for path in files]
            assert [told(reply) for reply in replies] == [(ClientErrorCode.POLICY, "PolicyError: models = 4")] * 2
    for path in files:
        assert LocalNode.open(path).ledger.steps() == 0
        assert not list(path.parents[1].glob("cache*/tokens/*"))


def test_a_describe_looks_at_no_text(tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file = nodes(tmp_path, folders, "csv", (PLAIN, ODD))[0]

    def read(*_: Any) -> Any:
        raise AssertionError

    encoders = [f"fedlora.tasks.{task}.encode" for task in ("texts.TextTask", "causal_lm.CausalLM")]
    for name in ("fedlora.data.sources._any_texts", *encoders, "fedlora.clients.client_app.client_data"):
        monkeypatch.setattr(name, read)
    sections = {"model": {"task": "sequence-classification"}}
    for run, text in enumerate((a_config(folders["decoder"]), a_config(folders["encoder"], **sections)), 1):
        reply = ask(file, query(run, LABELS if run == 2 else []), text, run)
        assert reply.content["metrics"]["num-examples"] == ROWS  # type: ignore[index,call-overload]


def test_a_class_that_the_server_does_not_name_is_not_counted(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Without names the head would have as many rows as the file has classes."""
    file = nodes(tmp_path, folders, "csv", (PLAIN, ODD))[0]
    text = a_config(folders["encoder"], model={"task": "sequence-classification"})
    assert told(ask(file, query(1, []), text, 1)) == (ClientErrorCode.INPUT, "InputError")


def test_describes_are_limited_over_federations_and_restarts(tmp_path: Path, folders: dict[str, Path]) -> None:
    file = nodes(tmp_path, folders, "csv", (PLAIN, ODD), max_describes_per_day=5)[0]
    text = a_config(folders["decoder"])
    for run in range(1, 6):
        # Whether they are any good does not matter.
        reply = ask(file, query(run, []), text if run % 2 else "nonsense", run)
        assert reply.has_error() is (run % 2 == 0)
    limit = (ClientErrorCode.POLICY, "PolicyError: max_describes_per_day = 5")
    for run in (6, 5):
        assert told(ask(file, query(run, []), text, run)) == limit
    client_app.forget_data()
    assert told(ask(file, query(8, []), text, 8)) == limit
    # A day later, and as the owner likes.
    with sqlite3.connect(file.parent / "state" / "ledger.sqlite") as database:
        database.execute("UPDATE describes SET at = at - 86401 WHERE number = 1")
    assert not ask(file, query(9, []), text, 9).has_error()
    assert told(ask(file, query(10, []), text, 10)) == limit
    file.write_text(file.read_text().replace("max_describes_per_day = 5", "max_describes_per_day = 6"))
    assert not ask(file, query(11, []), text, 11).has_error()


def test_a_blank_line_is_no_row_and_a_row_without_text_is_one(tmp_path: Path, folders: dict[str, Path]) -> None:
    file = nodes(tmp_path, folders, "csv", (PLAIN, ODD))[0]
    lines = (file.parent / "own.csv").read_text().splitlines()
    (file.parent / "own.csv").write_text("\n".join([*lines[:3], ",", "", ",bad", *lines[3:], ","]) + "\n")
    sections = {"model": {"task": "sequence-classification"}}
    for run, text in enumerate((a_config(folders["decoder"]), a_config(folders["encoder"], **sections)), 1):
        reply = ask(file, query(run, LABELS if run == 2 else []), text, run)
        assert reply.content["metrics"]["num-examples"] == ROWS + 1  # type: ignore[index,call-overload]


def test_what_a_server_makes_the_ledger_hold_is_bounded(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_ledger, "_IDLE_RUNS", 10)
    file = nodes(tmp_path, folders, "csv", (PLAIN, ODD))[0]
    ledger = LocalNode.open(file).ledger
    for run in range(50):
        ledger.register(f"f{run}", str(run), ["x" * 20_000])
    assert ledger.path.stat().st_size < 400_000
    for names in (["x" * 200_000], ["x"] * 50_000):
        with pytest.raises(InputError):
            ledger.register("f", "1000", names)
    with pytest.raises(InputError):
        ledger.register("f" * 300, "1000", None)
    # Those that trained stay.
    with ledger.round("f49", "49", 1, tiny.plan(sigma=50.0), 1) as charge:
        charge.step()
    for run in range(1000, 1020):
        ledger.register(f"f{run}", str(run), None)
    assert ledger.label_names("f49", "49") == ["x" * 20_000]


def test_every_seed_shares_a_nodes_tokens_and_the_cache_stays_within_its_bound(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = nodes(tmp_path, folders, "csv", (PLAIN, ODD), max_cache_gb=2.5e-6)[0]
    cache = tmp_path / "cache0"
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    server = Attacker(folders, 0)

    def train(run: int, seed: int, length: int) -> set[Path]:
        for path in cache.glob("tokens/*"):
            os.utime(path, (path.stat().st_mtime - 100,) * 2)
        text = a_config(folders["decoder"], run={"seed": seed}, model={"max_length": length})
        assert not ask(file, query(run, []), text, run).has_error()
        content = {
            "arrays": encode(server.arrays(text)),
            "config": ConfigRecord({"server-round": 1, "learning-rate": 0.1}),
            NODE_RECORD: ConfigRecord({"federation": f"f{run}", "client": 0}),
        }
        message = train_message(FIRST_NODE, RecordDict(content))
        message.metadata.__dict__["_run_id"] = run
        assert not ask(file, message, text, run).has_error()
        return {path for path in cache.glob("tokens/*") if path.is_dir()}

    first = train(1, 1, 16)
    assert len(first) == 1
    assert train(2, 2, 16) == first
    for length in range(2, 5):
        found = train(10 + length, 1, length)
        assert all(len([*path.glob("partitions/[!.]*")]) == 1 for path in found)
        sizes = [file.stat().st_size for path in found for file in path.rglob("*") if file.is_file()]
        assert sum(sizes) <= 2500
    # The oldest went, and the newest is there.
    assert first.isdisjoint(found)
    assert found
