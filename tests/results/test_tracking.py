"""TensorBoard, Weights & Biases (offline) and MLflow hold what rounds.jsonl says: read back with their own packages."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from fedlora import InputError, RunResult
from fedlora.results.tracking import TRACKERS, open_trackers
from tests.llama_runs import LlamaRuns

ALL = {kind.name: True for kind in TRACKERS}
PRIVATE = {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaRuns]:
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        # Of its stores the one that needs no server and no database.
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_TRACKING_URI", (folder / "mlruns").as_uri())
        patch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
        yield LlamaRuns(folder)


@pytest.fixture(scope="module")
def tracked(runs: LlamaRuns) -> RunResult:
    """A run that is stopped after its first round, and resumed."""
    data = {**runs.config().data.model_dump(exclude_none=True), "validation": str(runs.folder / "test.jsonl")}
    return runs.run(stop=1, run={"rounds": 3, "seed": 3, "name": "small"}, tracking=ALL, privacy=PRIVATE, data=data)


def expected(result: RunResult) -> dict[str, dict[int, float]]:
    """Return some numbers by round, from the run folder."""
    rounds = result.rounds
    columns = {
        "test/perplexity": "metrics.perplexity",
        "validation/loss": "metrics.validation.loss",
        "bytes/uplink_bytes": "communication.uplink_bytes",
        "privacy/epsilon": "epsilon",
    }
    return {name: {int(r): float(v) for r, v in rounds[column].items()} for name, column in columns.items()}


def wandb_records(file: Path) -> list[Record]:
    """Read a .wandb file: records in blocks of 32 KiB, as LevelDB's log has them, after a header of 7 bytes."""
    content, place, whole, found = file.read_bytes(), 7, b"", list[Record]()
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a record's end
            found.append(Record.FromString(whole))
            whole = b""
    return found


def test_tensorboard_has_every_round(tracked: RunResult) -> None:
    events = EventAccumulator(str(tracked.folder / "tensorboard"))
    events.Reload()
    for name, values in expected(tracked).items():
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(values)


def test_weights_and_biases_has_every_round_of_one_run(tracked: RunResult) -> None:
    files = sorted((tracked.folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1  # named by the run's id
    records = [record for file in files for record in wandb_records(file)]
    started = [record.run for record in records if record.HasField("run")]
    assert {(run.project, run.display_name) for run in started} == {("fedlora", "small")}
    config = {update.key: json.loads(update.value_json) for run in started for update in run.config.update}
    assert config["method"]["name"] == "ffa-lora"
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    for name, values in expected(tracked).items():
        assert {int(row["_step"]): row[name] for row in rows if name in row} == pytest.approx(values)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1, 0]  # stopped, finished


def test_mlflow_has_every_round_of_one_run(tracked: RunResult) -> None:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fedlora")
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'small'")
    assert run.info.status == "FINISHED"
    assert run.data.params["method.name"] == "ffa-lora"
    assert run.data.params["data.partition.kind"] == "natural"
    for name, values in expected(tracked).items():
        history = client.get_metric_history(run.info.run_id, name)
        assert {metric.step: metric.value for metric in history} == pytest.approx(values)


def test_the_federations_key_is_not_told(tracked: RunResult) -> None:
    from fedlora.results.checkpoint import Checkpoint

    checkpoint = Checkpoint(tracked.folder / "checkpoint" / "state.sqlite")
    key = checkpoint.get("federation")
    checkpoint.close()
    assert key
    told = [*(tracked.folder / "wandb").rglob("*"), *(tracked.folder.parent / "mlruns").rglob("*")]
    assert not any(key.encode() in file.read_bytes() for file in told if file.is_file())


@pytest.mark.parametrize("name", ALL)
def test_a_missing_package_is_named(
    runs: LlamaRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    config = runs.config(tracking={name: True})
    with pytest.raises(InputError, match=rf"tracking\.{name} = .*pip install {name}"):
        list(open_trackers(config, tmp_path, "key"))


def test_a_server_that_is_away_is_told_in_a_line(
    runs: LlamaRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("no answer\nfrom the server")

    monkeypatch.setattr("mlflow.MlflowClient.get_experiment_by_name", away)
    with pytest.raises(InputError, match=r"tracking\.mlflow = .*no answer from the server") as caught:
        list(open_trackers(runs.config(tracking={"mlflow": True}), tmp_path, "key"))
    assert "\n" not in str(caught.value)


def test_a_tracker_that_fails_amid_the_run_does_not_end_it(runs: LlamaRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr("mlflow.MlflowClient.log_metric", away)
    result = runs.run(tracking={"mlflow": True})
    assert len(result.rounds) == 3
    assert "tracking.mlflow fails: no answer" in (result.folder / "run.log").read_text()
