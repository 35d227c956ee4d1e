"""A finished run in Python: tables that say what its files say, and how it is shown."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from pathlib import Path

import pytest

import fedlora
from fedlora import InputError, RunResult, simulate
from fedlora.results import folder as run_folders
from fedlora.strategies.callbacks import Progress
from tests.llama_runs import LlamaRuns, table

PRIVATE = {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def result(runs: LlamaRuns) -> RunResult:
    data = {**runs.config().data.model_dump(exclude_none=True), "validation": str(runs.folder / "test.jsonl")}
    server = {"evaluate_every": 2, "evaluate_clients": True, "fraction_train": 0.5}
    return runs.run(privacy=PRIVATE, data=data, server=server, run={"rounds": 4, "seed": 3, "name": "small"})


def test_rounds_are_the_lines_of_the_file(result: RunResult) -> None:
    lines = [json.loads(line) for line in (result.folder / "rounds.jsonl").read_text().splitlines()]
    rounds = result.rounds
    assert list(rounds.index) == [1, 2, 3, 4]
    assert rounds["epsilon"].tolist() == [line["epsilon"] for line in lines]
    assert rounds["communication.uplink_bytes"].tolist() == [line["communication"]["uplink_bytes"] for line in lines]
    assert rounds["metrics.perplexity"].dropna().to_dict() == {
        line["round"]: line["metrics"]["perplexity"] for line in lines if line["metrics"]
    }
    assert rounds["metrics.validation.perplexity"].notna().tolist() == [False, True, False, True]
    assert rounds.loc[2, "clients"] == lines[1]["clients"]


def test_tables_are_the_rows_of_the_files(result: RunResult) -> None:
    for found, name in ((result.communication, "communication.csv"), (result.privacy, "privacy.csv")):
        rows = table(result, name)
        assert list(found.columns) == list(rows[0])
        assert found.astype(str)["client"].tolist() == [row["client"] for row in rows]
    assert result.communication["message_bytes"].sum() == sum(
        int(row["message_bytes"]) for row in table(result, "communication.csv")
    )


def test_clients_have_their_examples_bytes_epsilon_and_score(result: RunResult) -> None:
    clients = result.clients
    assert clients["name"].tolist() == ["o0", "o1", "o2", "o3"]
    assert clients["examples"].tolist() == [5, 5, 4, 16]
    sent = [row for row in table(result, "communication.csv") if row["direction"] == "up"]
    last = {row["client"]: float(row["epsilon"]) for row in table(result, "privacy.csv")}
    own = {row["client"]: row for row in table(result, "clients.csv")}
    for client in clients.index:
        key = str(client)
        bytes_up = clients["up_bytes"].fillna(0)[client]
        assert bytes_up == sum(int(row["message_bytes"]) for row in sent if row["client"] == key)
        assert clients["epsilon"].fillna(0)[client] == last.get(key, 0)
        assert clients.loc[client, "loss"] == pytest.approx(float(own[key]["loss"]))


def test_a_run_is_opened_again(result: RunResult, tmp_path: Path) -> None:
    assert RunResult.load(str(result.folder)) == result
    model, tokenizer = fedlora.load(result)
    assert tokenizer("w4 w5")["input_ids"] == [4, 5]
    assert model.config.vocab_size == 50
    with pytest.raises(InputError, match="no finished run"):
        RunResult.load(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        RunResult.load(tmp_path)


def test_a_run_is_shown_in_a_line_and_as_a_table(result: RunResult) -> None:
    assert repr(result).startswith(f"RunResult('{result.folder}': ffa-lora, 4 rounds, loss ")
    assert f"epsilon {result.summary['epsilon']['max']:.3f})" in repr(result)
    shown = result._repr_html_()
    assert "<tr><th>method</th><td>ffa-lora</td></tr>" in shown
    assert "on validation, after round" in shown
    named = dataclasses.replace(result, summary={**result.summary, "method": "<b>"})
    assert "<td>&lt;b&gt;</td>" in named._repr_html_()


def test_a_run_without_privacy_has_an_empty_table(runs: LlamaRuns) -> None:
    result = runs.run(run={"rounds": 1, "seed": 3})
    assert result.privacy.empty
    assert "epsilon" not in result.clients.columns
    assert "epsilon" not in repr(result)


def test_the_figure_shows_itself_in_a_notebook(result: RunResult) -> None:
    figure = result.plot()
    assert len(figure.axes) == 4
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    assert len(pickle.loads(pickle.dumps(figure)).axes) == 4


def test_a_folder_that_is_opened_in_vain_does_not_log(runs: LlamaRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    content, output = runs.config().model_dump(exclude_none=True), runs.folder / "in-vain"

    def stop(line: dict[str, object]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(content, output=output, progress=Progress(on_round=stop))
    write = run_folders.write_atomically

    def full(path: Path, text: str) -> None:
        if path.name == "rounds.jsonl":
            raise PermissionError(13, "not allowed")
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(run_folders, "write_atomically", full)
        with pytest.raises(InputError, match="cannot be written"):
            simulate(content, output=output, resume=True)
    assert not logging.getLogger("fedlora").handlers
    simulate(content, output=output, resume=True)
    told = [line for line in (output / "run.log").read_text().splitlines() if "FFA-LoRA" in line]
    assert len(told) == 2  # once a process
