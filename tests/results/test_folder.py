"""The run folder: never overwritten, never half written, and resumed only with the config that it was made with."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import Config, load_config
from fedlora.errors import InputError
from fedlora.results import RunFolder
from fedlora.results.folder import COMMUNICATION, PRIVACY, run_folder, to_json, write_atomically

BASE = {
    "model": {"name": "asset:minilm-l6"},
    "data": {"name": "asset:rotten-tomatoes", "partition": {"clients": 4}},
    "method": {"name": "fedit"},
}
UP = {"round": 1, "client": 0, "direction": "up", "payload_bytes": 8, "message_bytes": 99, "formula_bytes": 8}
SPENT = {
    "round": 1,
    "client": 0,
    "steps": 2,
    "sample_rate": 0.1,
    "noise_multiplier": 0.5,
    "epsilon": 1 / 3,
    "delta": 1e-5,
}


def config(**overrides: Any) -> Config:
    return load_config(BASE, {key.replace("__", "."): value for key, value in overrides.items()})


def add(folder: RunFolder, number: int) -> None:
    folder.checkpoint["round"] = number
    folder.add_round({"round": number, "text": "a\nb"}, [{**UP, "round": number}], [{**SPENT, "round": number}])


def content(path: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in path.iterdir() if p.suffix in (".jsonl", ".csv")}


def refused(path: Path, given: Config, field: str) -> InputError:
    with pytest.raises(InputError) as caught:
        RunFolder.resume(path, given)
    assert caught.value.field == field
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def test_a_new_folder_has_a_config_that_runs_again(tmp_path: Path) -> None:
    resolved = config(client__learning_rate=0.5)
    folder = RunFolder.create(tmp_path / "a" / "b", config(), resolved)
    assert load_config(tmp_path / "a" / "b" / "config.toml") == resolved == folder.resolved
    assert not folder.finished
    folder.close()


def test_growing_files_have_headers_and_a_line_as_soon_as_a_round_is_done(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", config())
    for number in (1, 2):
        add(folder, number)
        lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == list(range(1, number + 1))
        for file, columns in (("communication.csv", COMMUNICATION), ("privacy.csv", PRIVACY)):
            with (tmp_path / "run" / file).open() as stream:
                rows = list(csv.DictReader(stream))
            assert tuple(rows[0]) == columns
            assert [row["round"] for row in rows] == [str(n) for n in range(1, number + 1)]
    assert float(rows[0]["epsilon"]) == 1 / 3
    assert folder.rounds() == [{"round": 1, "text": "a\nb"}, {"round": 2, "text": "a\nb"}]
    folder.close()


def test_a_run_without_privacy_has_the_header_alone(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", config())
    folder.add_round({"round": 1}, [UP], [])
    assert (tmp_path / "run" / "privacy.csv").read_text() == ",".join(PRIVACY) + "\n"
    folder.close()


@pytest.mark.parametrize("kind", ["folder", "file", "link to nowhere"])
def test_what_exists_is_never_written_to(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run"
    if kind == "folder":
        path.mkdir()
        (path / "precious").write_text("x")
    elif kind == "file":
        path.write_text("x")
    else:
        path.symlink_to(tmp_path / "nowhere")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"--output.*exists already"):
        RunFolder.create(path, config())
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "/dev/null/run", "x" * 300, "a\0b"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--output.*cannot be made"):
        RunFolder.create(tmp_path / place, config())


def add_and_fail(folder: RunFolder, rounds: int, error: type[BaseException] = InputError) -> None:
    for number in range(rounds):
        add(folder, number + 1)
    raise InputError("data.name", "x", "mend it") if error is InputError else error


@pytest.mark.parametrize("rounds", [0, 1])
def test_wrong_input_discards_a_new_folder_without_a_round(tmp_path: Path, rounds: int) -> None:
    path = tmp_path / "run"
    with pytest.raises(InputError, match="mend it"), run_folder(path, config()) as folder:
        add_and_fail(folder, rounds)
    assert path.exists() == (rounds > 0)


def test_a_folder_that_was_there_or_was_interrupted_is_kept_and_let_go(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), run_folder(path, config()) as folder:
        add_and_fail(folder, 0, KeyboardInterrupt)
    with pytest.raises(InputError, match="mend it"), run_folder(path, config(), resume=True) as folder:
        add_and_fail(folder, 0)
    with run_folder(path, config(), resume=True) as folder:
        add(folder, 1)
    assert "rounds.jsonl" in content(path)


@pytest.mark.parametrize("same", ["given", "resolved"])
def test_a_run_goes_on_with_the_config_that_it_has(tmp_path: Path, same: str) -> None:
    given, resolved = config(), config(client__learning_rate=0.5, simulation__cohort_size=1)
    folder = RunFolder.create(tmp_path / "run", given, resolved)
    add(folder, 1)
    folder.close()
    again = RunFolder.resume(tmp_path / "run", {"given": given, "resolved": resolved}[same])
    assert again.resolved == resolved
    assert again.checkpoint.get("round") == 1
    add(again, 2)
    assert [line["round"] for line in again.rounds()] == [1, 2]
    again.close()


def test_what_auto_became_in_a_round_is_kept_with_that_round(tmp_path: Path) -> None:
    chosen = {"client__physical_batch_size": 4, "client__gradient_checkpointing": True}
    given, measured = config(), config(simulation__cohort_size=16, **chosen)
    folder = RunFolder.create(tmp_path / "run", given)
    folder.set_resolved(measured)
    folder.close()  # the round was not done: it will be measured again
    folder = RunFolder.resume(tmp_path / "run", given)
    assert folder.resolved == given
    folder.set_resolved(measured)
    add(folder, 1)
    folder.close()
    assert load_config(tmp_path / "run" / "config.toml") == measured
    folder = RunFolder.resume(tmp_path / "run", given)
    assert folder.resolved == measured
    folder.close()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"run__seed": 1}, "run.seed"),
        ({"method__name": "ffa-lora"}, "method.name"),
        ({"data__partition__clients": 5}, "data.partition.clients"),
        ({"client__learning_rate": 0.1}, "client.learning_rate"),
    ],
)
def test_a_changed_config_does_not_resume(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    RunFolder.create(tmp_path / "run", config()).close()
    error = refused(tmp_path / "run", config(**change), field)
    assert str(error.value) in str(error)
    RunFolder.resume(tmp_path / "run", config()).close()  # the folder is as good as before, and free


@pytest.mark.parametrize("place", ["nothing", "empty", "x" * 300])
def test_what_is_no_run_does_not_resume(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / place, config(), "--resume")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_run_that_goes_on_is_not_resumed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", config())
    assert "another process" in refused(tmp_path / "run", config(), "--resume").remedy
    folder.close()
    RunFolder.resume(tmp_path / "run", config()).close()


def test_growing_files_are_made_good_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "run"
    folder = RunFolder.create(path, config())
    add(folder, 1)
    add(folder, 2)
    folder.close()
    good = content(path)
    (path / "rounds.jsonl").write_text(good["rounds.jsonl"][:-5])
    (path / "communication.csv").unlink()
    (path / "privacy.csv").write_text(good["privacy.csv"] + "3,0,half a li")
    (path / "config.toml").unlink()
    RunFolder.resume(path, config()).close()
    assert content(path) == good
    assert load_config(path / "config.toml") == config()


DIES = """
import os, sys
from fedlora.config import load_config
from fedlora.results import RunFolder
folder = RunFolder.create(sys.argv[1], load_config(sys.argv[2]))
for number in (1, 2):
    if number == 2:
        folder._append = lambda file, lines: (
            os._exit(9) if file == sys.argv[3] else RunFolder._append(folder, file, lines)
        )
    folder.checkpoint["round"] = number
    folder.add_round({"round": number}, [], [])
"""


def test_a_death_between_the_commit_and_the_files_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run"
    command = [sys.executable, "-c", DIES, str(path), config().to_toml(), "communication.csv"]
    assert subprocess.run(command, check=False).returncode == 9
    assert len((path / "rounds.jsonl").read_text().splitlines()) == 2
    folder = RunFolder.resume(path, config())
    assert folder.checkpoint.get("round") == 2
    assert [line["round"] for line in folder.rounds()] == [1, 2]
    assert content(path)["communication.csv"] == ",".join(COMMUNICATION) + "\n"
    folder.close()


def test_a_finished_run_knows_its_summary(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", config())
    summary = {"method": "fedit", "seconds": {"total": 1.5}, "epsilon": None}
    result = folder.finish(summary)
    folder.close()
    assert (result.folder, result.summary) == (tmp_path / "run", summary)
    again = RunFolder.resume(tmp_path / "run", config())
    assert again.finished
    assert again.result() == result
    again.close()


@given(
    st.recursive(
        st.floats() | st.none() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_what_is_written_is_json_with_null_for_what_is_not_finite(content: Any) -> None:
    def expected(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: expected(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [expected(inner) for inner in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(to_json(content), parse_constant=refuse) == expected(content)


def test_the_log_is_in_the_folder_and_ends_with_it(tmp_path: Path) -> None:
    log = logging.getLogger("fedlora")
    handlers = list(log.handlers)
    folder = RunFolder.create(tmp_path / "run", config())
    log.info("in the run")
    folder.close()
    log.info("after the run")
    text = (tmp_path / "run" / "run.log").read_text()
    assert "in the run" in text
    assert "after the run" not in text
    assert log.handlers == handlers


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_finished_run_without_its_summary_is_told_in_one_line(tmp_path: Path) -> None:
    summary = tmp_path / "run/summary.json"
    with run_folder(tmp_path / "run", config()) as folder:
        folder.finish({"method": "fedit"})
    summary.write_text("{")
    with pytest.raises(InputError, match=r"^--resume = .*summary.json': is not as the run wrote it; delete it"):
        RunFolder.resume(tmp_path / "run", config())
    summary.unlink()
    with run_folder(tmp_path / "run", config(), resume=True) as folder:
        assert not folder.finished
        assert "summary.json of the finished run is gone" in folder.notes[0]
        folder.finish({"method": "fedit"})
    with run_folder(tmp_path / "run", config(), resume=True) as folder:
        assert folder.finished
        summary.write_text("{")
        with pytest.raises(InputError, match=r"^--resume = .*summary.json': .*cannot be read .*; run anew$"):
            folder.result()


def test_resuming_where_nothing_can_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    with run_folder(tmp_path / "run", config()) as folder:
        add(folder, 1)
    (tmp_path / "run/config.toml").unlink()
    (tmp_path / "run/config.toml").mkdir()
    assert "cannot be written" in refused(tmp_path / "run", config(), "--resume").remedy
    (tmp_path / "run/config.toml").rmdir()
    RunFolder.resume(tmp_path / "run", config()).close()  # nothing holds it
