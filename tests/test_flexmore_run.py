"""A whole flexmore run on a tiny Llama: its folder, its bytes, privacy, resuming, and an owner that leaves."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedlora
from fedlora.clients.client_app import app
from fedlora.config import Config, load_config
from fedlora.data.tokens import prepare_data
from fedlora.errors import InputError
from fedlora.experts import Mixture
from fedlora.experts.folder import load_expert
from fedlora.node.local_node import LocalNode
from fedlora.node.names import NODE_FILE
from fedlora.privacy.calibration import spent_epsilon
from fedlora.results.checkpoint import Checkpoint
from fedlora.results.folder import RunResult, run_folder
from fedlora.strategies.callbacks import Progress
from fedlora.strategies.federation import Federation
from fedlora.strategies.flexmore import FlexMoRE
from fedlora.strategies.server_app import resolve
from fedlora.study.forecast import forecast
from tests import tiny
from tests.messages import FIRST_NODE, FakeGrid
from tests.owner import listed, write_node

DOMAINS = {"cats": range(5, 20), "misc+alt": range(22, 36), "sea": range(36, 48)}

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config on a model and data that were written for it: three owners, each with words of its own."""
    folder = tmp_path_factory.mktemp("flexmore")
    tiny.save_llama(folder / "model")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6), ("public", 6)):
        rows = [
            {
                "text": " ".join(f"w{i}" for i in rng.choice(list(known), 8)),
                "domain": domain,
                "ward": f"{domain} {n % 2}",
            }
            for domain, known in DOMAINS.items()
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"name": "tiny", "rounds": 2},
        "model": {"name": str(folder / "model"), "task": "causal-lm", "max_length": 12},
        "data": {
            "name": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "partition": {"kind": "natural", "column": "domain"},
        },
        "method": {"name": "flexmore", "ranks": {"cats": 3, "misc+alt": "full", "sea": 1}},
        "client": {"local_steps": 12, "batch_size": 8, "learning_rate": 0.02},
        "simulation": {"workers": 0},
    }


@pytest.fixture(scope="module")
def run(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    fedlora.simulate(content, output=folder)
    return folder


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tokenizer("w7 w25 w40 w9", return_tensors="pt")).logits
    return found


def test_the_folder(run, content):
    summary = json.loads((run / "summary.json").read_text())
    assert not (run / "adapter").exists()
    tables = summary["final"]["by_domain"]
    assert set(tables) == {"public", "mixture", *DOMAINS}
    assert all(set(table) == set(DOMAINS) for table in tables.values())
    means = {name: np.mean(np.log(list(table.values()))) for name, table in tables.items()}
    assert all(tables[domain][domain] < 0.9 * tables["public"][domain] for domain in DOMAINS)
    assert means["mixture"] < means["public"]
    assert summary["start"]["by_domain"]["public"] == tables["public"]
    # Bytes, by rank.
    width, inner, layers = 32, 48, 2
    numbers = {"cats": 3 * 3 * (width + inner), "misc+alt": 3 * width * inner, "sea": 3 * (width + inner)}
    expected = {owner: 4 * layers * (count + width + 1) for owner, count in numbers.items()}
    assert {owner: facts["bytes"] for owner, facts in summary["experts"].items()} == expected
    assert summary["break_even_rank"] == pytest.approx(width * inner / (width + inner))
    assert summary["trainable_parameters"] == sum(expected.values()) / 4
    with (run / "communication.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 2 * 3
    for row in rows:
        payload = (
            0 if (row["round"], row["direction"]) == ("1", "down") else expected[list(expected)[int(row["client"])]]
        )
        assert int(row["payload_bytes"]) == int(row["formula_bytes"]) == payload
        assert 0 < int(row["message_bytes"]) - payload < 8000


def test_its_mixture_and_experts_load(run, content):
    mixture, tokenizer = fedlora.load(run)
    assert isinstance(mixture, Mixture)
    assert (mixture.owners, mixture.config.ranks) == (list(DOMAINS), [3, "full", 1])
    stock = AutoModelForCausalLM.from_pretrained(run / "mixture")
    assert torch.equal(logits(mixture, tokenizer), logits(stock, tokenizer))
    ids = tokenizer("w7 w25", return_tensors="pt")["input_ids"]
    assert mixture.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 2
    adapter = json.loads((run / "experts" / "cats" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(adapter["base_model_name_or_path"])
    public = logits(base, tokenizer)
    assert not torch.equal(logits(PeftModel.from_pretrained(base, str(run / "experts" / "cats")), tokenizer), public)
    # The experts alone make the same mixture again.
    again = Mixture.of(AutoModelForCausalLM.from_pretrained(content["model"]["name"])).eval()
    for owner in DOMAINS:
        again.add_expert(load_expert(run / "experts" / owner, again))
    tiny.assert_close(logits(again, tokenizer), logits(mixture, tokenizer))


def test_a_resumed_run_gives_the_same_bits(run, content, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(line: dict[str, Any]) -> None:
        if line["round"] == 1:
            raise StoppedError

    folder = tmp_path / "stopped"
    with pytest.raises(StoppedError):
        fedlora.simulate(content, output=folder, progress=Progress(on_round=stop))
    fedlora.simulate(content, output=folder, resume=True)
    first, second = (json.loads((path / "summary.json").read_text()) for path in (run, folder))
    assert first["final"] == second["final"]
    (one, _), (other, _) = fedlora.load(run), fedlora.load(folder)
    assert tiny.difference(one.state_dict(), other.state_dict()) == 0


@pytest.mark.usefixtures("ray_here")
def test_a_strategy_of_ones_own_can_build_on_flexmore(run, content, tmp_path):
    class Watched(FlexMoRE):
        seen = 0

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            Watched.seen += 1
            return super().aggregate_train(server_round, replies)

    # In a worker of Ray, unlike the other runs here.
    result = fedlora.simulate(content, {"simulation.workers": 1}, output=tmp_path / "own", strategy=Watched)
    assert Watched.seen == 2
    assert result.summary["final"] == json.loads((run / "summary.json").read_text())["final"]


def test_an_owner_leaves_a_finished_run(run):
    before, tokenizer = fedlora.load(run)
    with pytest.raises(InputError, match="has no expert here"):
        fedlora.opt_out(run, "dogs")
    assert torch.equal(logits(fedlora.load(run)[0], tokenizer), logits(before, tokenizer))
    fedlora.opt_out(run, "misc+alt")
    after, _ = fedlora.load(run)
    before.remove_expert("misc+alt")
    assert torch.equal(logits(after, tokenizer), logits(before, tokenizer))
    assert sorted(path.name for path in (run / "experts").iterdir()) == ["cats", "sea"]
    assert not [path for path in run.iterdir() if path.name.startswith(".mixture")]
    checkpoint = Checkpoint(run / "checkpoint" / "state.sqlite")
    owners = {name.rpartition("/")[0] for name in checkpoint.get_arrays("trained") or {}}
    checkpoint.close()
    assert owners == {"cats", "sea"}
    assert json.loads((run / "summary.json").read_text())["opted_out"] == ["misc+alt"]
    with pytest.raises(InputError, match="holds no finished run of a method that keeps owners' parts apart"):
        fedlora.opt_out(run / "mixture", "cats")


def test_under_privacy_the_start_is_charged(content, tmp_path):
    """Epsilon after the run is that of all noisy steps and of one noisy start; no router row travels."""
    changes = {
        "privacy.mode": "example",
        "privacy.target_epsilon": 20.0,
        "method.ranks": [2, 3, 2],
        "data.public": content["data"]["test"].replace("test.jsonl", "public.jsonl"),
        "method.router_tuning_steps": 3,
        "client.local_steps": 3,
    }
    result = fedlora.simulate(content, changes, output=tmp_path / "private")
    epsilon = result.summary["epsilon"]
    assert epsilon["covers_init"] is True
    with (tmp_path / "private" / "privacy.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["client"] == "0"]
    step = (float(rows[0]["noise_multiplier"]), float(rows[0]["sample_rate"]))
    steps_alone = spent_epsilon("rdp", 1e-5, ((*step, 6),))
    assert steps_alone < float(rows[-1]["epsilon"]) <= 20.0
    assert float(rows[-1]["epsilon"]) > 20.0 * 0.97
    assert result.summary["router_tuned"] is True
    with (tmp_path / "private" / "communication.csv").open() as stream:
        initial = [row for row in csv.DictReader(stream) if row["direction"] == "initial"]
    assert all(int(row["payload_bytes"]) == int(row["formula_bytes"]) == 0 for row in initial)


def test_router_rows_from_public_text_travel_once_and_cost_no_epsilon(content, tmp_path):
    changes = {
        "privacy.mode": "example",
        "privacy.target_epsilon": 20.0,
        "data.public": content["data"]["test"].replace("test.jsonl", "public.jsonl"),
        "method.router_init": "public",
        "client.local_steps": 3,
    }
    fedlora.simulate(content, changes, output=tmp_path / "run")
    with (tmp_path / "run" / "communication.csv").open() as stream:
        initial = [row for row in csv.DictReader(stream) if row["direction"] == "initial"]
    assert [int(row["payload_bytes"]) for row in initial] == [int(row["formula_bytes"]) for row in initial]
    assert [int(row["payload_bytes"]) for row in initial] == [4 * 2 * 32] * 3
    with (tmp_path / "run" / "privacy.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["client"] == "0"]
    step = (float(rows[0]["noise_multiplier"]), float(rows[0]["sample_rate"]))
    assert float(rows[-1]["epsilon"]) == pytest.approx(spent_epsilon("rdp", 1e-5, ((*step, 6),)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # Two clients an owner, of which a round asks some.
        {"data.partition.column": "ward", "server.fraction_train": 0.4, "method.ranks": [3, 1, "full", 2, 1, 2]},
        {
            "privacy.mode": "example",
            "privacy.target_epsilon": 20.0,
            "data.public": "public",
            "method.router_init": "public",
            "run.rounds": 1,
        },
    ],
)
def test_the_forecast_comes_true(content, changes, tmp_path):
    if "data.public" in changes:
        changes = {**changes, "data.public": content["data"]["test"].replace("test.jsonl", "public.jsonl")}
    changes = {"client.local_steps": 2, **changes}
    expected = forecast(resolve(load_config(content, changes)))
    summary = fedlora.simulate(content, changes, output=tmp_path / "run").summary
    sent = dict.fromkeys(("initial", "down", "up"), 0)
    with (tmp_path / "run" / "communication.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        sent[row["direction"]] += int(row["payload_bytes"])
    assert sent == {
        "initial": expected.initial_bytes,
        "down": expected.downlink_bytes,
        "up": expected.uplink_bytes,
    }
    assert (sent["initial"] > 0) == ("data.public" in changes)
    assert (sent["down"] > 0) == (summary["rounds"] > 1)
    assert summary["trainable_parameters"] == expected.trainable_parameters
    assert expected.steps == 2 * sum(row["direction"] == "up" for row in rows)
    ranks = changes.get("method.ranks", [3, "full", 1])
    assert expected.ranks == ranks
    with (tmp_path / "run" / "privacy.csv").open() as stream:
        noise = {int(row["client"]): float(row["noise_multiplier"]) for row in csv.DictReader(stream)}
    assert noise == dict(enumerate(expected.noise_multipliers))
    assert len(noise) == (3 if "privacy.mode" in changes else 0)


class Owners(FakeGrid):
    """Real nodes in this process; the last one comes after the first round."""

    def __init__(self, node_files: list[Path], config: Config) -> None:
        super().__init__(self._ask)
        self.node_files, self.run_config = node_files, {"config": config.to_toml()}
        self.rounds = 0
        self._queries: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return range(FIRST_NODE, FIRST_NODE + len(self.node_files) - (self.rounds == 0))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"query-{len(self._queries)}"
            self._queries[message.metadata.message_id] = message
            yield message.metadata.message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._ask(self._queries[key]) for key in message_ids]

    def _ask(self, message: Message) -> Message:
        if message.metadata.message_type == "train":
            self.rounds = max(self.rounds, int(message.metadata.group_id))
        node = message.metadata.dst_node_id
        context = Context(
            run_id=message.metadata.run_id,
            node_id=node,
            node_config={NODE_FILE: str(self.node_files[node - FIRST_NODE])},
            state=RecordDict(),
            run_config=self.run_config,
        )
        return app(message, context)


@pytest.fixture
def node_files(content: dict[str, Any], tmp_path: Path, cache: Path) -> list[Path]:
    files = []
    for name in ("cats", "sea", "misc+alt"):
        lines = Path(content["data"]["name"]).read_text().splitlines()
        rows = [{"note": row["text"]} for row in map(json.loads, lines) if row["domain"] == name]
        policy = {"max_epsilon": 30.0, "models": listed(content["model"]["name"])}
        files.append(write_node(tmp_path / name, cache, rows, name=name.replace("+", "-"), policy=policy))
    return files


def run_on_nodes(
    content: dict[str, Any], files: list[Path], folder: Path, method: dict[str, Any]
) -> tuple[RunResult, FlexMoRE]:
    given = {
        **content,
        "run": {"name": "nodes", "rounds": 3},
        "data": {"name": "nodes", "test": content["data"]["test"]},
        "method": {"name": "flexmore", **method},
        "privacy": {"mode": "example", "target_epsilon": 20.0, "target_delta": 1e-3},
        "server": {"min_replies": 2},
    }
    config = resolve(load_config(given))
    strategy = FlexMoRE(config)
    with run_folder(folder, config) as opened:
        return Federation(config, Owners(files, config), opened, prepare_data(config), strategy).run(), strategy


def test_owners_on_real_nodes_come_when_they_like(content, tmp_path, node_files):
    """A node's expert bears its owner's name, at the rank of that name; its ledger is charged for the start."""
    files = node_files
    method = {"device_profile": {"2": 0.5, "full": 0.5}}
    result, strategy = run_on_nodes(content, files, tmp_path / "run", method)
    # Numbers follow names; who comes later is the last.
    assert strategy.owners == ["cats", "sea", "misc-alt"]
    assert list(result.summary["experts"]) == sorted(strategy.owners)
    assert {o: e["rank"] for o, e in result.summary["experts"].items()} == dict(
        zip(strategy.owners, strategy.ranks, strict=True)
    )
    for path, rounds in zip(files, (3, 3, 1), strict=True):
        steps = sorted(n for _, _, n in LocalNode.open(path).ledger.history())
        assert (steps[0], steps[-1]) == (1, 12 * rounds)
        assert 0 < LocalNode.open(path).ledger.epsilon() <= 20.0


@pytest.mark.parametrize("ranks", [[2, "full"], {"sea": "full", "cats": 2, "dogs": 1}])
def test_a_node_without_a_rank_is_refused_by_name_and_the_others_go_on(content, tmp_path, node_files, ranks):
    result, strategy = run_on_nodes(content, node_files, tmp_path / "run", {"ranks": ranks})
    assert {owner: facts["rank"] for owner, facts in result.summary["experts"].items()} == {"cats": 2, "sea": "full"}
    assert (strategy.owners, result.summary["clients"]) == (["cats", "sea"], 2)
    assert "has no rank for node misc-alt" in (tmp_path / "run" / "run.log").read_text()
    assert LocalNode.open(node_files[2]).ledger.history() == []


def test_ranks_that_no_model_can_have_end_a_run_before_a_node_trains(content, tmp_path, node_files):
    with pytest.raises(InputError, match=r"method\.ranks = 99"):
        run_on_nodes(content, node_files, tmp_path / "run", {"ranks": [2, 1, 99]})
    assert not (tmp_path / "run").exists()
    assert all(LocalNode.open(path).ledger.history() == [] for path in node_files)


def test_a_simulation_needs_a_rank_for_every_client(content, tmp_path):
    with pytest.raises(InputError, match="needs one rank for each of the 3 clients"):
        fedlora.simulate(content, {"method.ranks": [2, 1]}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
