"""``fedlora show`` and ``fedlora runs``, on a run of a config that ``fedlora init`` wrote, and on remains of others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.cli.formats import curve
from fedlora.results.checkpoint import Checkpoint
from tests.command import Done, fedlora
from tests.small_runs import world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of runs: ``first`` is finished, ``second`` stopped after its first round."""
    place = tmp_path_factory.mktemp("looking")
    with world(place) as made:
        file = place / "mine.toml"
        done = fedlora(
            *("init", file, "--data", made.folder / "train.jsonl", "--text", "text", "--label", "label"),
            *("--owner", "owner", "--model", made.folder / "bert", "--epsilon", "8"),
        )
        assert done.code == 0, done.err
        small = ("--set", "simulation.workers=0", "--set", "run.rounds=2", "--set", "model.max_length=10")
        done = fedlora("run", file, *small, "--output", place / "runs" / "first")
        assert done.code == 0, done.err
        second = shutil.copytree(place / "runs" / "first", place / "runs" / "second")
        (second / "summary.json").unlink()
        lines = (second / "rounds.jsonl").read_text().splitlines(keepends=True)
        (second / "rounds.jsonl").write_text(lines[0])
        yield place / "runs"


def shown(*arguments: object) -> Done:
    done = fedlora("show", *arguments)
    assert done.code == 0, done.err
    return done


def test_a_run_is_shown_as_its_folder_has_it(folder: Path) -> None:
    out = shown(folder / "first").out
    summary = json.loads((folder / "first" / "summary.json").read_text())
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    examples = summary["test_examples"]
    assert lines["tested"] == f"tested on   {examples} examples, so one is {100 / examples:.2g} points of accuracy"
    assert lines["method"].split()[1:] == ["fed-sb,", "rank", "8"]
    assert "2/2 rounds" in lines["run"]
    assert "target epsilon 8, rdp" in lines["privacy"]
    assert f"{summary['epsilon']['max']:.3f} at delta" in lines["epsilon"]
    assert f"{summary['epsilon']['mean']:.3f}" in lines["mean"]
    assert f"{summary['communication']['formula_bytes']:,} by the formula" in lines["payload"]
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["1"], ["2"])]
    assert len(rows) == 2
    assert rows[1][4] == f"{json.loads((folder / 'first' / 'rounds.jsonl').read_text().splitlines()[1])['epsilon']:.3f}"


def test_an_unfinished_run_is_shown_with_how_to_go_on(folder: Path) -> None:
    out = shown(folder / "second").out
    assert "1/2 rounds, unfinished, seed" in out
    assert out.splitlines()[-1].endswith(f"--output {folder / 'second'} --resume")


def test_a_run_that_is_still_running_is_not_to_be_continued(folder: Path, tmp_path: Path) -> None:
    made = shutil.copytree(folder / "second", tmp_path / "runs" / "second")
    checkpoint = Checkpoint(made / "checkpoint" / "state.sqlite")
    try:
        out = shown(made).out
        assert "1/2 rounds, running, seed" in out
        assert "--resume" not in out
        assert "1/2 running" in fedlora("runs", tmp_path / "runs").out
    finally:
        checkpoint.close()
    assert "unfinished" in shown(made).out


def test_scores_by_domain_are_a_table(folder: Path, tmp_path: Path) -> None:
    made = shutil.copytree(folder / "first", tmp_path / "domains")
    summary = json.loads((made / "summary.json").read_text())
    summary["final"]["by_domain"] = {"mixture": {"rec": 0.5, "sci": 0.25}, "public": {"rec": 0.125, "sci": 1.0}}
    (made / "summary.json").write_text(json.dumps(summary))
    out = shown(made).out
    at = out.splitlines().index("accuracy by domain")
    rows = [line.split() for line in out.splitlines()[at + 1 : at + 4]]
    assert rows == [["rec", "sci"], ["mixture", "50.0%", "25.0%"], ["public", "12.5%", "100.0%"]]


def test_runs_are_listed_finished_or_not(folder: Path) -> None:
    study = folder / "study" / "tuning" / "0"
    study.mkdir(parents=True)
    shutil.copy(folder / "first" / "config.toml", study)
    done = fedlora("runs", folder)
    assert done.code == 0, done.err
    head, first, second = (line.split() for line in done.out.splitlines())
    assert head == ["run", "method", "model", "rounds", "score", "epsilon", "sent", "seconds"]
    summary = json.loads((folder / "first" / "summary.json").read_text())
    assert first[:4] == ["first", "fed-sb", "bert", "2/2"]
    assert f"{summary['final']['accuracy']:.1%}" in first
    assert f"{summary['epsilon']['max']:.3f}" in first
    assert second[:5] == ["second", "fed-sb", "bert", "1/2", "unfinished"]


def test_a_damaged_run_hides_no_other(folder: Path, tmp_path: Path) -> None:
    for name in ("good", "torn"):
        shutil.copytree(folder / "first", tmp_path / name)
    (tmp_path / "torn" / "rounds.jsonl").write_text('{"round": 1')
    done = fedlora("runs", tmp_path)
    assert done.code == 0
    assert done.out.splitlines()[1].split()[0] == "good"
    assert "cannot be read: its rounds or its summary are damaged" in done.out.splitlines()[2]
    done = fedlora("show", tmp_path / "torn")
    assert (done.code, len(done.err.splitlines())) == (2, 1)


@pytest.mark.parametrize("command", ["show", "runs"])
def test_a_folder_without_a_run_is_one_line(command: str, tmp_path: Path) -> None:
    done = fedlora(command, tmp_path)
    assert (done.code, len(done.err.splitlines())) == (2, 1)


def test_the_curve_rises_where_values_do() -> None:
    *rows, axis = curve([(1, 0.0), (2, 1.0), (3, 3.0)], ("0", "3"), 17, plain=True)
    assert [row[8:] for row in rows] == ["      ###", "      ###", "   ######", "#########"]
    assert (rows[0][:8], rows[-1][:8]) == ("    3 | ", "    0 | ")
    assert axis.split() == ["round", "1", "3"]


def test_a_long_curve_fits_its_width_and_keeps_its_end() -> None:
    points = [(i, float(i)) for i in range(1, 501)]
    lines = curve(points, ("1", "500"), 60)
    assert max(map(len, lines)) <= 60
    assert lines[-1].split()[-1] == "500"
    assert lines[0].endswith("█")
