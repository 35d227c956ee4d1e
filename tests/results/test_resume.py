"""Resuming checks what it resumes: the bits of a run that never stopped, or one line; no traceback, no other bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

import fedlora
from fedlora import InputError, simulate
from fedlora.results.checkpoint import PREVIOUS, Checkpoint, reopen
from fedlora.results.outputs import SUMS
from fedlora.strategies.callbacks import Progress
from tests.bare_runs import bare_runs
from tests.command import fedlora as command
from tests.tiny import save_llama

TABLES = ("facts", "arrays", "states", "lines")
ADAPTER = "adapter/adapter_model.safetensors"


@dataclass
class Runs:
    """A folder with the data and the model, a run that was never stopped, and one that stopped after round 2 of 3."""

    place: Path
    config: dict[str, Any]

    @property
    def whole(self) -> Path:
        return self.place / "whole"

    def copy(self, to: Path, of: str = "stopped") -> Path:
        shutil.copytree(self.place / of, to)
        return to

    def go_on(self, folder: Path, **changes: Any) -> list[str]:
        """Resume, and return what the user is told."""
        notes: list[str] = []
        progress = Progress(on_note=notes.append)
        simulate(self.config, changes, output=folder, resume=True, progress=progress)
        return notes

    def check_bits(self, folder: Path) -> None:
        """Compare a run with the one that was never stopped."""
        for name in (ADAPTER, "communication.csv", "privacy.csv", "partition.csv", "config.toml"):
            assert (folder / name).read_bytes() == (self.whole / name).read_bytes()
        assert metrics(folder) == metrics(self.whole)
        summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, self.whole)]
        for key in ("final", "start", "epsilon", "communication"):
            assert summaries[0][key] == summaries[1][key]


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    place = tmp_path_factory.mktemp("resume")
    save_llama(place / "model")
    rng = np.random.default_rng(0)
    for name, rows in (("train", 40), ("test", 10)):
        texts = [" ".join(f"w{word}" for word in rng.integers(4, 50, rng.integers(3, 9))) for _ in range(rows)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"name": str(place / "train.jsonl"), "test": str(place / "test.jsonl"), "partition": {"clients": 3}}
    config = {
        "run": {"name": "resume", "rounds": 3, "seed": 1},
        "model": {"name": str(place / "model"), "task": "causal-lm", "max_length": 12},
        "data": data,
        "method": {"name": "fedit", "rank": 2},
        "client": {"batch_size": 4, "local_steps": 1},
        "privacy": {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-2},
        "simulation": {"workers": 0},
    }
    with bare_runs() as patch:
        patch.setenv("FEDLORA_CACHE", str(place / "cache"))
        found = Runs(place, config)
        simulate(config, output=found.whole)
        with pytest.raises(KeyboardInterrupt):
            simulate(config, output=place / "stopped", progress=Progress(on_round=_stop))
        yield found


def _stop(line: dict[str, Any]) -> None:
    if line["round"] == 2:
        raise KeyboardInterrupt


# Damage to the checkpoint.


def content(path: Path) -> list[Any]:
    """Everything in a checkpoint that bits depend on, by an open connection of its own."""
    connection = sqlite3.connect(path)
    try:
        found = [connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in TABLES]
    finally:
        connection.close()
    return found


def reopened(path: Path) -> tuple[Checkpoint, str | None] | InputError:
    try:
        return reopen(path)
    except InputError as error:
        return error


def flip(blob: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(blob))
    return blob[:place] + bytes([blob[place] ^ (1 << rng.randrange(8))]) + blob[place + 1 :]


def cut(blob: bytes, rng: random.Random) -> bytes:
    return blob[: rng.randrange(len(blob))]


def zero(blob: bytes, rng: random.Random) -> bytes:
    """Zero a block, as a disk does that lost a write."""
    start = rng.randrange(0, len(blob), 512)
    return blob[:start] + bytes(min(rng.choice([1, 512, 4096]), len(blob) - start)) + blob[start + 4096 :]


def swap(blob: bytes, rng: random.Random) -> bytes:
    first, second = (4096 * rng.randrange(len(blob) // 4096) for _ in range(2))
    pages = bytearray(blob)
    pages[first : first + 4096], pages[second : second + 4096] = (
        blob[second : second + 4096],
        blob[first : first + 4096],
    )
    return bytes(pages)


def dirty(blob: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([1, 100, 5000]))


DAMAGES = [flip] * 150 + [cut] * 40 + [zero] * 30 + [swap] * 20 + [dirty] * 5


@pytest.mark.parametrize("with_previous", [True, False])
def test_a_damaged_checkpoint_is_what_it_was_or_the_round_before_or_one_line(
    runs: Runs, tmp_path: Path, with_previous: bool
) -> None:
    """What a resumed run does follows from the checkpoint's content, so content that is equal gives equal bits."""
    source = runs.place / "stopped" / "checkpoint"
    good = (source / "state.sqlite").read_bytes()
    last, before = content(source / "state.sqlite"), content(source / PREVIOUS)
    assert last != before
    outcomes = {"as it was": 0, "the round before": 0, "one line": 0}
    for number, damage in enumerate(DAMAGES):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "state.sqlite"
        path.write_bytes(damage(good, random.Random(number)))
        if with_previous:
            shutil.copy(source / PREVIOUS, folder)
        opened = reopened(path)
        if isinstance(opened, InputError):
            assert len(str(opened).splitlines()) == 1
            assert "damaged" in str(opened)
            outcomes["one line"] += 1
        else:
            checkpoint, note = opened
            checkpoint.close()
            if checkpoint.path.exists() and (found := content(path))[0]:
                assert found == (last if note is None else before), damage.__name__
                outcomes["as it was" if note is None else "the round before"] += 1
            else:  # of no byte: a checkpoint in which nothing was ever written
                assert not with_previous
        shutil.rmtree(folder)
    assert outcomes["one line" if with_previous else "the round before"] == 0
    assert outcomes["as it was"] > 0  # a byte that no page uses
    assert outcomes["the round before" if with_previous else "one line"] > len(DAMAGES) / 2


@pytest.mark.parametrize("damage", ["array", "state", "ledger row", "fact", "line", "table", "empty", "text", "gone"])
def test_a_run_whose_checkpoint_is_damaged_goes_back_a_round_to_the_same_bits(
    runs: Runs, tmp_path: Path, damage: str
) -> None:
    folder = runs.copy(tmp_path / "run")
    path = folder / "checkpoint" / "state.sqlite"
    changes = {
        "array": "UPDATE arrays SET value = substr(value, 1, length(value) - 1) || x'7f' WHERE name = 'trained'",
        "state": "UPDATE states SET state = substr(state, 1, 20) WHERE client = 1",
        "ledger row": "DELETE FROM states WHERE client = 1",
        "fact": "UPDATE facts SET value = '1' WHERE name = 'round'",
        "line": "DELETE FROM lines WHERE rowid = 2",
        "table": "DROP TABLE states",
    }
    if damage in changes:
        connection = sqlite3.connect(path)
        connection.execute(changes[damage])
        connection.commit()
        connection.close()
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else b"precious")
    damaged = path.read_bytes() if path.exists() else b""
    if damage in ("array", "text", "gone"):
        (note,) = runs.go_on(folder)
        runs.check_bits(folder)
    else:
        checkpoint, told = reopen(path)
        checkpoint.close()
        note = str(told)
        assert content(path) == content(path.with_name(PREVIOUS))
    assert "after round 1" in note
    if damaged:  # it is kept
        assert path.with_name("damaged-state.sqlite").read_bytes() == damaged


def test_without_a_round_to_go_back_to_damage_is_one_line(runs: Runs, tmp_path: Path) -> None:
    folder = runs.copy(tmp_path / "run")
    for name in ("state.sqlite", PREVIOUS):
        path = folder / "checkpoint" / name
        path.write_bytes(cut(path.read_bytes(), random.Random(3)))
    with pytest.raises(
        InputError, match=r"^--resume = .*state.sqlite.* is damaged .*; run anew with another --output$"
    ):
        runs.go_on(folder)
    (folder / "checkpoint" / PREVIOUS).unlink()
    (folder / "checkpoint" / "state.sqlite").write_bytes(b"")
    with pytest.raises(InputError, match="lost its checkpoint"):
        runs.go_on(folder)


def test_the_journal_of_a_transaction_that_is_missing_is_damage(tmp_path: Path) -> None:
    """A process died in a transaction, and only the main file was copied: it holds pages of two rounds."""
    path = tmp_path / "state.sqlite"
    checkpoint = Checkpoint(path)
    for number in (1, 2):
        checkpoint["round"] = number
        checkpoint["given"] = "x" * 3_000_000 * number
        checkpoint.commit()
    connection = checkpoint._connection
    connection.execute("PRAGMA cache_size = 10")
    checkpoint["round"] = 3
    checkpoint["given"] = "y" * 6_000_000
    assert path.with_name("state.sqlite-journal").stat().st_size
    other = tmp_path / "other"
    other.mkdir()
    (other / "state.sqlite").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="damaged"):
        reopen(other / "state.sqlite")
    # The journal came along: the round is undone.
    for file in tmp_path.glob("state.sqlite*"):
        shutil.copy(file, other)
    again, note = reopen(other / "state.sqlite")
    assert (again.get("round"), note) == (2, None)
    again.close()


# What the run was begun with.


def test_files_that_were_touched_or_moved_are_the_same(runs: Runs, tmp_path: Path) -> None:
    for file in runs.place.glob("*.jsonl"):
        os.utime(file, (1, 1))
    moved = tmp_path / "moved.jsonl"
    shutil.copy(runs.place / "train.jsonl", moved)
    folder = runs.copy(tmp_path / "run")
    assert runs.go_on(runs.copy(tmp_path / "touched")) == []
    runs.check_bits(tmp_path / "touched")
    (note,) = runs.go_on(folder, **{"data.name": str(moved)})
    assert str(moved) in note
    assert (folder / ADAPTER).read_bytes() == (runs.whole / ADAPTER).read_bytes()


def test_a_file_that_is_named_from_another_folder_is_the_same(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs.copy(tmp_path / "run")
    before = (folder / "config.toml").read_bytes()
    monkeypatch.chdir(runs.place)
    assert runs.go_on(folder, **{"data.name": "train.jsonl"}) == []
    # It means that file from any folder, as before.
    assert (folder / "config.toml").read_bytes() == before
    runs.check_bits(folder)


@pytest.mark.parametrize("changed", ["train", "test", "row", "model", "moved"])
def test_other_data_or_another_model_is_one_line(runs: Runs, tmp_path: Path, changed: str) -> None:
    folder = runs.copy(tmp_path / "run")
    overrides: dict[str, Any] = {}
    if changed == "model":
        file, field = runs.place / "model" / "model.safetensors", "model.name"
    else:
        name = "test" if changed == "test" else "train"
        file, field = runs.place / f"{name}.jsonl", "data.test" if changed == "test" else "data.name"
    good = file.read_bytes()
    other = good[:-1] + bytes([good[-1] ^ 1]) if changed == "model" else good.replace(b"w7", b"w8", 1)
    if changed == "row":
        other = good.rpartition(b"\n{")[0] + b"\n"
    if changed == "moved":
        file = tmp_path / "other.jsonl"
        overrides["data.name"] = str(file)
    try:
        file.write_bytes(other)
        before = content(folder / "checkpoint" / "state.sqlite")
        with pytest.raises(InputError, match=r"not as when the run began; bring") as refused:
            runs.go_on(folder, **overrides)
        assert refused.value.field == field
        assert content(folder / "checkpoint" / "state.sqlite") == before
    finally:
        file.write_bytes(good)
    runs.go_on(folder)
    runs.check_bits(folder)


def test_other_packages_are_told(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs.copy(tmp_path / "run")
    monkeypatch.setattr(
        "fedlora.strategies.summary._version", lambda package: "0.1" if package == "opacus" else version(package)
    )
    (note,) = runs.go_on(folder)
    assert note == f"opacus was {version('opacus')} when the run began and is 0.1 now; the last bits may differ"
    assert note in (folder / "run.log").read_text()


# The run folder's files.


def test_what_was_edited_by_hand_is_made_good_or_refused(runs: Runs, tmp_path: Path) -> None:
    folder = runs.copy(tmp_path / "run")
    for name in ("rounds.jsonl", "communication.csv", "privacy.csv", "partition.csv"):
        text = (folder / name).read_text()
        (folder / name).write_text(text[: len(text) // 2] + "9,9,9\n")
    config = (folder / "config.toml").read_text()
    for encoding in ("utf-8", "utf-8-sig"):  # some editors begin a file with a byte-order mark
        (folder / "config.toml").write_text(config.replace("local_steps = 1", "local_steps = 2"), encoding)
        with pytest.raises(InputError, match=r"^client.local_steps = 2: was edited in .*config.toml"):
            runs.go_on(folder)
    (folder / "config.toml").write_text(config[:50])
    assert runs.go_on(folder) == []
    runs.check_bits(folder)


def test_a_finished_run_is_whole_or_says_what_is_not(runs: Runs, tmp_path: Path) -> None:
    folder = runs.copy(tmp_path / "run", "whole")
    sums = dict(reversed(line.split("  ")) for line in (folder / SUMS).read_text().splitlines())
    assert set(sums) == {path.relative_to(folder).as_posix() for path in (folder / "adapter").rglob("*")}
    shutil.rmtree(folder / "adapter")
    (note,) = runs.go_on(folder)
    assert "adapter/" in note
    runs.check_bits(folder)
    (folder / ADAPTER).write_bytes(flip((folder / ADAPTER).read_bytes(), random.Random(0)))
    with pytest.raises(InputError, match=r"^--resume = .*safetensors.*is not as the run wrote it; delete it"):
        runs.go_on(folder)
    (folder / ADAPTER).unlink()
    (folder / "summary.json").unlink()
    runs.go_on(folder)
    runs.check_bits(folder)


CHANGES: list[Callable[[bytes, random.Random], bytes]] = [flip, cut]


def test_a_model_of_damaged_files_is_not_loaded(runs: Runs, tmp_path: Path) -> None:
    folder = runs.copy(tmp_path / "run", "whole")
    for number, path in enumerate(sorted((folder / "adapter").iterdir())):
        good = path.read_bytes()
        for change in CHANGES:
            path.write_bytes(change(good, random.Random(number)))
            with pytest.raises(InputError, match=rf"^FOLDER = .*{path.name} is not as the run wrote it"):
                fedlora.load(folder)
        # From before there were digests, or copied without them: still one line, or a model.
        (folder / SUMS).rename(folder / "aside")
        path.write_bytes(cut(good, random.Random(number)))
        if path.suffix != ".md":
            done = command("export", folder, "--output", tmp_path / f"export-{number}")
            assert (done.code, len(done.err.splitlines())) == (2, 1), done
        (folder / "aside").rename(folder / SUMS)
        path.unlink()
        with pytest.raises(InputError, match=rf"{path.name} is gone|no finished run"):
            fedlora.load(folder)
        path.write_bytes(good)
    fedlora.load(folder)


def test_another_runs_checkpoint_is_refused(runs: Runs, tmp_path: Path) -> None:
    config = {**runs.config, "run": {**runs.config["run"], "seed": 2}}
    (tmp_path / "other.toml").write_text(tomli_w.dumps(config))
    folder = runs.copy(tmp_path / "run")
    done = command("run", tmp_path / "other.toml", "--output", folder, "--resume")
    assert done.code == 2
    assert done.err.startswith("fedlora: run.seed = 2: differs from the run's 1")


def test_only_a_finished_run_of_another_version_is_resumed(runs: Runs, tmp_path: Path) -> None:
    for of in ("stopped", "whole"):
        checkpoint = Checkpoint(runs.copy(tmp_path / of, of) / "checkpoint" / "state.sqlite")
        checkpoint["format"] = 0
        checkpoint.commit()
        checkpoint.close()
    with pytest.raises(InputError, match="begun by another version of fedlora; resume it with that one") as caught:
        runs.go_on(tmp_path / "stopped")
    assert caught.value.field == "--resume"
    runs.go_on(tmp_path / "whole")
    (tmp_path / "whole" / ADAPTER).unlink()
    with pytest.raises(InputError, match="begun by another version"):
        runs.go_on(tmp_path / "whole")
