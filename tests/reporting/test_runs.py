"""What is read, what is refused, and in which words."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import InputError
from fedlora.reporting.report import write_report
from fedlora.reporting.runs import read_runs
from tests.command import fedlora
from tests.reporting.folders import make_run

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    *(("method",), ("seed",), ("rounds",), ("clients",), ("trainable_parameters",), ("epsilon",), ("seconds",)),
    *(("final",), ("final", "accuracy"), ("communication", "uplink_bytes"), ("environment",)),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("good") / "good", 1, {})


def names(*folders: Path) -> list[str]:
    return [run.name for run in read_runs(folders).runs]


def test_runs_are_found_in_runs_folders_of_runs_and_studies(tmp_path: Path) -> None:
    study = tmp_path / "study"
    for number, place in enumerate(("runs/a", "runs/b", "tuning/t", "replaced/r")):
        make_run(study / place, number, {"run.seed": number})
    (study / "study.toml").write_text("")
    make_run(tmp_path / "more" / "deep" / "report", 7, {"run.seed": 7})
    assert names(study) == ["a", "b"]
    assert names(study / "runs" / "b", study) == ["b", "a"]
    assert names(tmp_path) == ["report", "a", "b"]


def test_names_tell_folders_apart(tmp_path: Path) -> None:
    for number, place in enumerate(("one/run", "two/run", "two/other")):
        make_run(tmp_path / place, number, {"run.seed": number})
    assert names(tmp_path) == ["one/run", "other", "two/run"]


@pytest.mark.usefixtures("quick")
def test_unfinished_runs_are_listed_and_left_out(tmp_path: Path) -> None:
    make_run(tmp_path / "done", 0, {})
    stopped = make_run(tmp_path / "stopped", 1, {"run.seed": 1})
    (stopped / "summary.json").unlink()
    (stopped / "rounds.jsonl").write_text("{}\n")
    found = read_runs([tmp_path])
    assert [run.name for run in found.runs] == ["done"]
    assert [(run.name, run.rounds_done, run.rounds) for run in found.unfinished] == [("stopped", 1, 3)]
    done = fedlora("report", tmp_path)
    assert done.code == 0
    assert "stopped" in done.out
    assert "not finished (1 of 3 rounds)" in (tmp_path / "report.html").read_text()


def test_a_run_that_diverged_is_read_and_shown(tmp_path: Path) -> None:
    for seed in range(2):
        run = make_run(tmp_path / f"run-{seed}", seed, {"run.seed": seed}, task="causal-lm")
    summary = json.loads((run / "summary.json").read_text())
    summary["final"] = {"loss": None, "perplexity": None}
    (run / "summary.json").write_text(json.dumps(summary))
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    diverged = [line | {"metrics": line["metrics"] and summary["final"]} for line in lines]
    (run / "rounds.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in diverged))
    page, comparison = write_report([tmp_path])
    assert page.is_file()
    perplexities = [run.scores["perplexity"] for run in comparison.runs]
    assert [math.isfinite(value) for value in perplexities] == [True, False]


@pytest.mark.parametrize("place", ["missing", "empty", "unfinished"])
def test_a_folder_without_a_finished_run_is_refused_in_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    run = make_run(tmp_path / "unfinished", 0, {})
    (run / "summary.json").unlink()
    done = fedlora("report", tmp_path / place)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert place in done.err
    assert not (tmp_path / place / "report.html").exists()


@given(st.text())
def test_any_name_of_a_folder_is_read_or_refused(name: str) -> None:
    with pytest.raises(InputError, match="DIR"):
        read_runs([f"/nowhere/{name}"])


@given(place=st.sampled_from(PLACES), value=json_values)
def test_a_summary_that_was_changed_is_read_or_refused_by_name(
    good: Path, place: tuple[str, ...], value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    summary = json.loads((good / "summary.json").read_text())
    inner = summary
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    check(good, "summary.json", json.dumps(summary), tmp_path_factory)


@given(
    file=st.sampled_from(["summary.json", "rounds.jsonl", "communication.csv", "clients.csv", "partition.csv"]),
    start=st.integers(0, 2000),
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    keep=st.booleans(),
)
def test_a_damaged_file_is_read_or_refused_by_name(
    good: Path, file: str, start: int, text: str, keep: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = (good / file).read_text()
    check(good, file, content[:start] + text + (content[start:] if keep else ""), tmp_path_factory)


def check(good: Path, file: str, content: str, factory: pytest.TempPathFactory) -> None:
    folder = factory.mktemp("damaged") / "run"
    shutil.copytree(good, folder)
    (folder / file).write_text(content)
    refusal = None
    try:
        found = read_runs([folder])
    except InputError as error:
        refusal = str(error)
    if refusal is None:
        assert len(found.runs) == 1
    else:
        assert all(part in refusal for part in (str(folder), file, "run again, or leave it out"))
    shutil.rmtree(folder)


@pytest.mark.parametrize("file", ["config.toml", "rounds.jsonl", "communication.csv", "summary.json"])
def test_a_file_that_is_not_text_is_refused_by_name(good: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(good, tmp_path / "run")
    (tmp_path / "run" / file).write_bytes(b"\xff\xfe\x00")
    done = fedlora("report", tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert str(tmp_path / "run") in done.err
    assert file in done.err


def test_files_that_a_run_may_lack_are_not_needed(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "run")
    for file in ("clients.csv", "partition.csv", "privacy.csv"):
        (tmp_path / "run" / file).unlink()
    assert fedlora("report", tmp_path).code == 0
    figures = {path.stem for path in (tmp_path / "report" / "figures").iterdir()}
    assert not figures & {"fairness", "partition", "score-epsilon"}
    assert "score-rounds" in figures


def test_a_folder_that_cannot_be_searched_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs/one", 1, {})
    (tmp_path / "runs/locked").mkdir()

    def is_file(path: Path) -> bool:  # to root every folder is open
        if path.parent.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return path.exists()

    monkeypatch.setattr(Path, "is_file", is_file)
    with pytest.raises(InputError, match=r"^DIR = .*cannot be searched \(Permission denied: .*locked.*; give"):
        read_runs([tmp_path / "runs"])
