"""Whole runs on the real MiniLM (its first layer) and real reviews, on real workers and without."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import ray
import tomli_w
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from opacus.accountants import RDPAccountant
from safetensors.torch import load_file

from fedlora import simulate
from fedlora.config import load_config
from fedlora.errors import ClientErrorCode, InputError
from fedlora.methods import methods
from fedlora.reporting.report import write_report
from fedlora.results import RunResult
from fedlora.results.folder import COMMUNICATION, PRIVACY
from fedlora.strategies.callbacks import Progress
from fedlora.strategies.fedit import FedIT
from fedlora.timeline import FILE
from tests.bare_runs import bare_runs
from tests.command import fedlora

METHODS = methods()

ROOT = Path(__file__).parents[1]
CLIENTS, ROUNDS, RANK, TARGET, DELTA = 3, 2, 4, 8.0, 1e-3
HIDDEN = 384
MODULES = 2  # query and value of one layer
HEAD = 2 * HIDDEN + 2

CONFIG: dict[str, Any] = {
    "run": {"name": "end-to-end", "seed": 3, "rounds": ROUNDS},
    "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 32, "num_hidden_layers": 1},
    "data": {
        "name": "asset:rotten-tomatoes",
        "max_examples": 200,
        "max_test_examples": 50,
        "partition": {"kind": "dirichlet", "alpha": 5.0, "clients": CLIENTS, "min_examples": 20},
    },
    "method": {"name": "fed-sb", "rank": RANK},
    "client": {"batch_size": 8, "local_steps": 2},
    "privacy": {"mode": "example", "target_epsilon": TARGET, "target_delta": DELTA},
    "server": {"evaluate_clients": True},
    "network": {"profile": "lte", "seed": 4},
    "simulation": {"workers": 1},
}

# Numbers that travel: once, and each way in a round, as in METHODS with m = n = 384.
FORMULA = {
    "fedit": (0, MODULES * RANK * 2 * HIDDEN + HEAD),
    "ffa-lora": (MODULES * RANK * HIDDEN, MODULES * RANK * HIDDEN + HEAD),
    "fed-sb": (MODULES * RANK * 2 * HIDDEN, MODULES * RANK**2 + HEAD),
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cached", "ray_here")]

HERE = {"simulation.workers": 0}
"""Without a worker, which takes seconds to start; that the bits are the same has a test of its own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config_file(folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(CONFIG))
    return path


@pytest.fixture(scope="module", params=sorted(FORMULA))
def run(request: pytest.FixtureRequest, folder: Path) -> RunResult:
    """One run a method; flexmore, which needs a language model, has its own tests."""
    return simulated(folder, request.param)


def simulated(folder: Path, method: str) -> RunResult:
    """Run a method from a script, once; fed-sb, which the command runs again, on a worker."""
    path = folder / method
    if path.exists():
        return RunResult(path, json.loads((path / "summary.json").read_text()))
    return simulate(CONFIG, {"method.name": method, **({} if method == "fed-sb" else HERE)}, output=path)


@pytest.fixture
def bare() -> Iterator[None]:
    """Runs of the test itself draw no pictures; those of the fixtures do."""
    with bare_runs():
        yield


@pytest.fixture(scope="module")
def commanded(config_file: Path, folder: Path) -> tuple[Path, str]:
    """The fed-sb run again, by the command; what it printed."""
    done = fedlora("run", config_file, "--output", folder / "commanded")
    assert (done.code, done.err) == (0, "")
    return folder / "commanded", done.out


def table(path: Path) -> list[dict[str, Any]]:
    with path.open() as stream:
        rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    return [{k: v if k == "direction" else int(v) if v.isdigit() else float(v) for k, v in row.items()} for row in rows]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def adapter(run: Path) -> dict[str, str]:
    """Hash what was trained."""
    files = sorted((run / "adapter").glob("*.safetensors"))
    assert len(files) == 2
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def comparable(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in ("seconds", "environment")}


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "seconds"}


# Every method: the files of the contract and the numbers in them.


def test_every_file_of_the_contract_is_there(run: RunResult) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {
        *("config.toml", "summary.json", "rounds.jsonl", "communication.csv", "privacy.csv", "adapter", "checkpoint"),
        *("run.log", "partition.png"),
    }
    assert {path.name for path in (run.folder / "adapter").iterdir()} >= {
        *("adapter_config.json", "adapter_model.safetensors", "head.safetensors"),
    }
    for name, columns in (("communication.csv", COMMUNICATION), ("privacy.csv", PRIVACY)):
        assert (run.folder / name).read_text().splitlines()[0] == ",".join(columns)
    assert not [path for path in run.folder.rglob(".*")]  # no temporary files
    assert (run.folder / "partition.png").read_bytes()[:4] == b"\x89PNG"


def test_the_config_of_a_run_is_resolved_and_runs_again(run: RunResult) -> None:
    resolved = load_config(run.folder / "config.toml")
    method = METHODS[run.summary["method"]]
    assert resolved.client.learning_rate == method.learning_rates["adamw"]
    assert resolved.simulation.cohort_size == 1
    assert resolved.to_toml() == (run.folder / "config.toml").read_text()


def test_the_summary_has_what_the_contract_says(run: RunResult) -> None:
    summary = run.summary
    assert json.loads((run.folder / "summary.json").read_text()) == summary
    assert set(summary) >= {
        *("method", "seed", "rounds", "clients", "final", "best", "trainable_parameters", "epsilon"),
        *("communication", "seconds", "environment"),
    }
    assert (summary["seed"], summary["rounds"], summary["clients"]) == (3, ROUNDS, CLIENTS)
    assert set(summary["final"]) >= {"accuracy", "macro_f1", "majority", "loss"}
    assert set(summary["epsilon"]) == {"max", "mean", "delta", "accountant", "mode", "unit", "covers_init"}
    assert set(summary["seconds"]) == {"total", "load", "train", "communicate", "aggregate", "evaluate"}
    parts = [value for name, value in summary["seconds"].items() if name != "total"]
    assert min(parts) >= 0
    assert sum(parts) <= summary["seconds"]["total"] * 1.001
    assert summary["environment"]["versions"]["torch"] == torch.__version__
    assert summary["trainable_parameters"] == FORMULA[summary["method"]][1]


def test_every_round_is_a_line(run: RunResult) -> None:
    rounds = lines(run.folder)
    assert [line["round"] for line in rounds] == [1, 2]
    for line in rounds:
        assert line["clients"] == [0, 1, 2]
        assert line["failed"] == []
        assert line["train_loss"] > 0
        assert set(line["seconds"]) == {"train", "communicate", "aggregate", "evaluate"}
        assert 0 <= line["metrics"]["accuracy"] <= 1
    final = {k: v for k, v in run.summary["final"].items() if k in rounds[-1]["metrics"]}
    assert final == rounds[-1]["metrics"]
    assert rounds[-1]["communication"] == run.summary["communication"]


def test_the_payload_is_the_formula_to_the_byte(run: RunResult) -> None:
    once, each_way = FORMULA[run.summary["method"]]
    rows = table(run.folder / "communication.csv")
    expected = {"initial": 4 * once, "down": 4 * each_way, "up": 4 * each_way}
    for row in rows:
        assert row["payload_bytes"] == row["formula_bytes"] == expected[row["direction"]]
    contacts = [(row["round"], row["client"], row["direction"]) for row in rows]
    initial = [(1, client, "initial") for client in range(CLIENTS)] if once else []
    both = [(r, c, d) for r in (1, 2) for c in range(CLIENTS) for d in ("down", "up")]
    assert sorted(contacts) == sorted(initial + both)


def test_the_overhead_of_a_message_is_bounded(run: RunResult) -> None:
    arrays = {"fedit": 2 * MODULES + 2, "ffa-lora": MODULES + 2, "fed-sb": MODULES + 2}[run.summary["method"]]
    for row in table(run.folder / "communication.csv"):
        overhead = row["message_bytes"] - row["payload_bytes"]
        assert 0 < overhead < 1000 + 300 * max(arrays, 2 * MODULES)


def test_the_totals_are_the_sums_of_the_rows(run: RunResult) -> None:
    rows = table(run.folder / "communication.csv")
    totals = run.summary["communication"]
    for name, direction in (("initial_bytes", "initial"), ("downlink_bytes", "down"), ("uplink_bytes", "up")):
        assert totals[name] == sum(row["message_bytes"] for row in rows if row["direction"] == direction)
    for name in ("payload_bytes", "formula_bytes"):
        assert totals[name] == sum(row[name] for row in rows)


def test_epsilon_is_opacus_own_and_within_the_budget(run: RunResult) -> None:
    history: dict[int, list[tuple[float, float, int]]] = defaultdict(list)
    last: dict[int, float] = {}
    for row in table(run.folder / "privacy.csv"):
        history[row["client"]].append((row["noise_multiplier"], row["sample_rate"], row["steps"]))
        accountant = RDPAccountant()
        accountant.history = list(history[row["client"]])
        assert row["epsilon"] == pytest.approx(accountant.get_epsilon(delta=DELTA), rel=1e-9)
        assert row["delta"] == DELTA
        assert row["steps"] == 2
        last[row["client"]] = row["epsilon"]
    assert sorted(last) == [0, 1, 2]
    epsilon = run.summary["epsilon"]
    assert epsilon["max"] == max(last.values()) <= TARGET
    assert epsilon["max"] > 0.98 * TARGET  # the noise is no larger than it must be
    assert epsilon["mean"] == pytest.approx(sum(last.values()) / 3)
    assert lines(run.folder)[-1]["epsilon"] == epsilon["max"]
    assert (epsilon["delta"], epsilon["accountant"], epsilon["mode"]) == (DELTA, "rdp", "example")


def test_the_adapter_is_a_lora_for_a_base_that_can_be_loaded(run: RunResult) -> None:
    settings = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"]) == ("LORA", RANK)
    assert Path(settings["base_model_name_or_path"]).joinpath("config.json").is_file()
    tensors = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * MODULES
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == ((RANK, HIDDEN) if "lora_A" in name else (HIDDEN, RANK))
        assert tensor.abs().sum() > 0  # it was trained, or drawn
        assert torch.isfinite(tensor).all()
    head = load_file(run.folder / "adapter" / "head.safetensors")
    assert sorted(tuple(tensor.shape) for tensor in head.values()) == [(2,), (2, HIDDEN)]


def test_without_noise_epsilon_has_no_bound_and_every_file_is_json_all_the_same(folder: Path) -> None:
    path = folder / "no-noise"
    privacy = {"mode": "example", "noise_multiplier": 0.0, "target_delta": DELTA}
    config = {**CONFIG, "privacy": privacy, "simulation": {"workers": 0}}

    def stop(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, output=path, progress=Progress(on_round=stop))
    result = simulate(config, output=path, resume=True)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    texts = [(path / "summary.json").read_text(), *(path / "rounds.jsonl").read_text().splitlines()]
    summary, *of_rounds = (json.loads(text, parse_constant=refuse) for text in texts)
    assert summary == result.summary
    assert (summary["epsilon"]["max"], summary["epsilon"]["mean"]) == (None, None)
    assert [line["epsilon"] for line in of_rounds] == [None] * ROUNDS
    assert {row["epsilon"] for row in table(path / "privacy.csv")} == {float("inf")}
    config_file = folder / "no-noise.toml"
    config_file.write_text(tomli_w.dumps(config))
    assert "infinite at delta" in fedlora("run", config_file, "--output", path, "--resume").out
    page, comparison = write_report([path], folder / "no-noise-report")
    assert comparison.runs[0].summary.epsilon.max == float("inf")
    assert page.is_file()


# The same bits.


def test_the_same_seed_gives_the_same_bits(folder: Path, commanded: tuple[Path, str]) -> None:
    first, (again, _) = simulated(folder, "fed-sb").folder, commanded
    assert adapter(first) == adapter(again)
    assert [without_time(line) for line in lines(first)] == [without_time(line) for line in lines(again)]
    for name in ("communication.csv", "privacy.csv", "config.toml"):
        assert (first / name).read_text() == (again / name).read_text()


def test_rounds_say_how_far_clients_drift_and_how_long_their_messages_take(run: RunResult) -> None:
    rows, total = table(run.folder / "communication.csv"), 0.0
    for line in lines(run.folder):
        assert line["drift"] > 0
        seconds: dict[int, float] = defaultdict(float)
        for row in rows:
            if row["round"] == line["round"]:
                down, up, latency = np.random.default_rng([4, row["client"], 0x4C]).standard_normal(3)
                rate = 1e6 / 8 * (6.8 * np.exp(up) if row["direction"] == "up" else 29.0 * np.exp(down))
                once = row["direction"] == "initial"
                seconds[row["client"]] += row["message_bytes"] / rate
                seconds[row["client"]] += 0 if once else 0.029 / 2 * np.exp(0.5 * latency)
        assert len(seconds) == CLIENTS
        network = line["network"]
        assert network["seconds"] == pytest.approx(max(seconds.values()))
        assert network["slowest"] == max(seconds, key=lambda client: seconds[client])
        total += network["seconds"]
    assert run.summary["network"] == {"profile": "lte", "seed": 4, "seconds": pytest.approx(total)}


def test_the_final_model_is_evaluated_on_every_clients_examples(run: RunResult) -> None:
    clients, examples = table(run.folder / "clients.csv"), defaultdict(int)
    with (run.folder / "partition.csv").open() as stream:
        for row in csv.DictReader(stream):
            examples[int(row["client"])] += int(row["examples"])
            assert row["label"] in ("fresh", "rotten")
    assert {row["client"]: row["examples"] for row in clients} == examples
    assert sum(examples.values()) == 200
    accuracies = [row["accuracy"] for row in clients]
    for row in clients:
        right = row["accuracy"] * row["examples"]
        assert right == pytest.approx(round(right), abs=1e-9)
    fairness = run.summary["fairness"]
    assert (fairness["min"], fairness["max"]) == (min(accuracies), max(accuracies))
    assert fairness["std"] == pytest.approx(np.std(accuracies))
    assert fairness["covered"] is False


def test_a_report_compares_the_runs(folder: Path, tmp_path: Path) -> None:
    runs = [simulated(folder, method) for method in sorted(FORMULA)]
    done = fedlora("report", *(run.folder for run in runs), "--output", tmp_path / "report")
    assert (done.code, done.err) == (0, "")
    with (tmp_path / "report" / "report" / "runs.csv").open() as stream:
        rows = {row["method"]: row for row in csv.DictReader(stream)}
    for run in runs:
        row = rows[run.summary["method"]]
        assert float(row["accuracy"]) == pytest.approx(run.summary["final"]["accuracy"])
        assert float(row["seconds_lte"]) > 0
        assert float(row["uplink_bytes"]) == run.summary["communication"]["uplink_bytes"]
    assert (tmp_path / "report" / "report.html").stat().st_size > 10**6


def test_the_command_and_the_function_give_the_same_summary(folder: Path, commanded: tuple[Path, str]) -> None:
    path, out = commanded
    by_command = json.loads((path / "summary.json").read_text())
    by_function = simulated(folder, "fed-sb").summary
    assert comparable(by_command) == comparable(by_function)
    assert set(by_command) == set(by_function)
    printed = out.splitlines()
    # What the user should know of the data stands before the table.
    while "cuts" in printed[0]:
        printed.pop(0)
    assert printed[0].split()[0] == "round"
    assert [line.split()[0] for line in printed[1:3]] == ["1", "2"]
    assert printed[-1].split() == ["folder", str(path)]


def test_a_finished_run_is_not_run_again(
    config_file: Path, commanded: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = commanded
    before = {file: file.stat().st_mtime_ns for file in (path / "adapter").iterdir()}
    summary = json.loads((path / "summary.json").read_text())
    monkeypatch.setattr("fedlora.simulation.RayGrid", None)
    monkeypatch.setattr("fedlora.simulator.prepare_data", None)
    done = fedlora("run", config_file, "--output", path, "--resume")
    assert (done.code, done.err) == (0, "")
    assert "finished already" in done.out
    assert simulate(CONFIG, output=path, resume=True).summary == summary
    assert {file: file.stat().st_mtime_ns for file in (path / "adapter").iterdir()} == before
    refused = fedlora("run", config_file, "--output", path, "--resume", "--set", "run.rounds=3")
    assert refused.code == 2
    assert refused.err.startswith("fedlora: run.rounds = 3: ")


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("workers", [2, 0])
def test_two_workers_or_none_give_the_bits_of_one(folder: Path, commanded: tuple[Path, str], workers: int) -> None:
    other = simulate(CONFIG, {"simulation.workers": workers}, output=folder / f"{workers}-workers")
    assert adapter(other.folder) == adapter(commanded[0])
    for name in ("communication.csv", "privacy.csv"):
        assert (other.folder / name).read_text() == (commanded[0] / name).read_text()


@pytest.mark.usefixtures("bare")
def test_runs_after_each_other_in_one_process_are_as_if_alone(folder: Path) -> None:
    """The second run finds the base model and data of the first; a run of another method and seed lies between."""
    first = simulate(CONFIG, HERE, output=folder / "first")
    simulate(CONFIG, {**HERE, "method.name": "ffa-lora", "run.seed": 9}, output=folder / "between")
    again = simulate(CONFIG, {**HERE, "privacy.target_epsilon": 2.0}, output=folder / "epsilon")
    last = simulate(CONFIG, HERE, output=folder / "last")
    assert adapter(last.folder) == adapter(first.folder)
    assert (last.folder / "communication.csv").read_text() == (first.folder / "communication.csv").read_text()
    assert again.summary["epsilon"]["max"] < 2.0 < first.summary["epsilon"]["max"]


def test_a_killed_run_goes_on_to_the_same_bits(folder: Path, commanded: tuple[Path, str], cache: Path) -> None:
    killed, config_file = folder / "killed", folder / "killed.toml"
    # On the Ray of this process, which is there already.
    here = CONFIG["simulation"] | {"address": ray.get_runtime_context().gcs_address}
    config_file.write_text(tomli_w.dumps({**CONFIG, "simulation": here}))
    environment = {**os.environ, "FEDLORA_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "killed_run.py"), str(config_file), str(killed)]
    ended = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=600)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [line["round"] for line in lines(killed)] == [1]
    assert not (killed / "summary.json").exists()
    done = fedlora("run", config_file, "--output", killed, "--resume")
    assert (done.code, done.err) == (0, "")
    whole, _ = commanded
    assert adapter(killed) == adapter(whole)
    assert [without_time(line) for line in lines(killed)] == [without_time(line) for line in lines(whole)]
    for name in ("communication.csv", "privacy.csv"):
        assert (killed / name).read_text() == (whole / name).read_text()
    summaries = [json.loads((path / "summary.json").read_text()) for path in (killed, whole)]
    assert comparable(summaries[0]) == comparable(summaries[1])


def test_sigterm_stops_a_run_as_ctrl_c_does(config_file: Path, folder: Path, cache: Path) -> None:
    stopped = folder / "stopped"
    command = [
        sys.executable,
        "-c",
        "from fedlora.cli import main; main()",
        "run",
        str(config_file),
        "--output",
        str(stopped),
    ]
    timeline = folder / "timeline.jsonl"
    environment = {**os.environ, "FEDLORA_CACHE": str(cache), "PYTHONPATH": str(ROOT), FILE: str(timeline)}
    run = subprocess.Popen(
        [*command, "--set", "run.rounds=200"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    rounds = stopped / "rounds.jsonl"
    while run.poll() is None and not (rounds.exists() and rounds.read_text()):
        time.sleep(0.1)
    run.terminate()
    _, told = run.communicate(timeout=600)
    again = ["fedlora", "run", str(config_file), "--set", "run.rounds=200", "--output", str(stopped), "--resume"]
    assert (run.returncode, told) == (1, f"fedlora: stopped; continue with: {shlex.join(again)}\n")
    assert not (stopped / "summary.json").exists()
    # Ray, and the imports of the driver and of its worker, went side by side.
    first = {line["phase"]: line for line in map(json.loads, reversed(timeline.read_text().splitlines()))}
    assert first["ray"]["began"] < first["imports"]["ended"]
    assert max(first["ray"]["ended"], first["imports"]["ended"]) <= first["data"]["began"]
    assert first["worker: imports"]["process"] != first["imports"]["process"] == first["ray"]["process"]


# What a user may bring along.


class Counted(FedIT):
    """A user's own method: FedIT that counts what it is asked."""

    made: list[Counted] = []  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.aggregated: list[int] = []
        Counted.made.append(self)

    def aggregate_train(self, server_round: int, replies: Any) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate, and remember the round."""
        self.aggregated.append(server_round)
        return super().aggregate_train(server_round, replies)


def reviews(count: int) -> datasets.Dataset:
    texts = [f"{'a joy' if i % 2 else 'a waste'} of {i} minutes" for i in range(count)]
    return datasets.Dataset.from_dict({"snippet": texts, "verdict": ["yes" if i % 2 else "no" for i in range(count)]})


@pytest.mark.usefixtures("bare")
def test_own_data_own_strategy_and_a_client_that_fails(folder: Path) -> None:
    overrides = {
        **HERE,
        "method.name": "fedit",
        "privacy.mode": "none",
        "data.text": "snippet",
        "data.label": "verdict",
        "data.partition.kind": "iid",
        "simulation.cohort_size": 3,
    }
    result = simulate(
        CONFIG,
        overrides,
        output=folder / "own",
        data={"train": reviews(90), "test": reviews(20)},
        strategy=Counted,
        client_app="tests.faulty_app:app",
    )
    (made,) = Counted.made
    assert made.aggregated == [1, 2]
    first, second = lines(result.folder)
    assert first["failed"] == []
    # The others of its cohort trained; the one that failed is reported and left out.
    ((failure),) = second["failed"]
    assert (failure["client"], failure["code"]) == (1, ClientErrorCode.FAILED)
    assert failure["error"].startswith("Traceback")
    assert failure["error"].strip().endswith("MemoryError: client 1 has no room")
    assert second["clients"] == [0, 1, 2]
    assert second["counted"]
    assert second["round"] == 2
    assert "client 1 failed" in (result.folder / "run.log").read_text()
    sent = {(row["round"], row["client"], row["direction"]): row for row in table(result.folder / "communication.csv")}
    assert sent[2, 1, "up"]["payload_bytes"] == sent[2, 1, "up"]["formula_bytes"] == 0
    assert sent[2, 0, "up"]["payload_bytes"] == sent[2, 0, "up"]["formula_bytes"] > 0
    assert result.summary["epsilon"] is None
    assert (result.folder / "privacy.csv").read_text().splitlines() == [",".join(PRIVACY)]
    assert result.summary["final"]["majority"] == 0.5
    assert json.loads((result.folder / "adapter" / "labels.json").read_text()) == ["no", "yes"]


@pytest.mark.usefixtures("bare")
def test_flowers_own_strategy_can_be_brought(folder: Path) -> None:
    class Watched(FedAvg):
        replies = 0

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            messages: list[Message] = list(replies)
            Watched.replies += sum(message.has_content() for message in messages)
            return super().aggregate_train(server_round, messages)

    strategy = Watched(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    result = simulate(CONFIG, {**HERE, "method.name": "fedit"}, output=folder / "fedavg", strategy=strategy)
    assert Watched.replies == CLIENTS * ROUNDS
    assert all(line["failed"] == [] and line["counted"] for line in lines(result.folder))
    assert result.summary["epsilon"]["max"] <= TARGET
    rows = table(result.folder / "communication.csv")
    assert {row["payload_bytes"] - row["formula_bytes"] for row in rows} == {0}
    assert len(rows) == 2 * CLIENTS * ROUNDS


@pytest.mark.parametrize(
    ("strategy", "remedy"), [("fedavg", "no Strategy"), (lambda config: 3, "no Strategy"), (FedAvg, "an instance")]
)
def test_what_is_no_strategy_is_told_before_anything_is_loaded(strategy: Any, remedy: str, folder: Path) -> None:
    with pytest.raises(InputError, match=f"^strategy = .*{remedy}"):
        simulate(CONFIG, {"data.name": "nowhere.csv"}, output=folder / "none", strategy=strategy)
    assert not (folder / "none").exists()
