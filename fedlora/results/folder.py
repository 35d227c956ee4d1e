"""The run folder: everything that a run knows, written so that no moment of death leaves it half written."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sqlite3
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.assets import is_asset
from fedlora.config import Config, read_toml
from fedlora.csv_files import csv_lines
from fedlora.errors import InputError, RefusedError
from fedlora.results.checkpoint import PREVIOUS, Checkpoint, reopen
from fedlora.results.outputs import check_outputs, find_outputs, write_sums
from fedlora.storage import is_full, writes_to

log = logging.getLogger("fedlora")

COMMUNICATION = ("round", "client", "direction", "payload_bytes", "message_bytes", "formula_bytes")
CLIENTS = ("client", "examples", "loss", "accuracy")
PARTITION = ("client", "name", "label", "examples")
PRIVACY = ("round", "client", "steps", "sample_rate", "noise_multiplier", "epsilon", "delta")


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes
    ----------
    folder : Path
    summary : dict
        The content of summary.json.
    """

    folder: Path
    summary: dict[str, Any]


class RunFolder:
    """Writes a run's files.

    Parameters
    ----------
    path : Path
    config : Config
        As given; ``resolved`` may differ from it in what "auto" chose.

    Attributes
    ----------
    checkpoint : Checkpoint
    resolved : Config
        The config that the run has; on resume that of the folder.
    resumed : bool
        Whether the folder was opened to go on with its run.
    finished : bool
        Whether the run is done, and all that it made is there.
    notes : list of str
        What the user should know of the resumed run.
    """

    def __init__(self, path: Path, config: Config, checkpoint: Checkpoint, resumed: bool = False) -> None:
        self.path, self.checkpoint, self.resumed = path, checkpoint, resumed
        self.resolved = config
        self.notes: list[str] = []
        self.finished = bool(checkpoint.get("finished", False))
        self._log = _Log(path / "run.log", encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("fedlora").addHandler(self._log)
        logging.getLogger("fedlora").setLevel(logging.INFO)

    @classmethod
    def create(cls, path: str | Path, config: Config, resolved: Config | None = None) -> RunFolder:
        """Make a new folder.

        Parameters
        ----------
        path : str or Path
        config : Config
            As given.
        resolved : Config, optional
            With what "auto" and defaults became.

        Raises
        ------
        InputError
            If it exists already, or cannot be written.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True)
            (path / "checkpoint").mkdir()
        except FileExistsError:
            remedy = "exists already; choose another folder, or go on with --resume"
            raise InputError("--output", str(path), remedy) from None
        except (OSError, ValueError) as error:
            remedy = f"cannot be made ({getattr(error, 'strerror', error)}); choose another folder"
            raise InputError("--output", str(path), remedy) from None
        try:
            folder = cls(path, config, Checkpoint(path / "checkpoint" / "state.sqlite"))
            folder.resolved = resolved or config
            folder.checkpoint["given"] = config.to_toml()
            folder.checkpoint["resolved"] = folder.resolved.to_toml()
            folder.checkpoint.commit()
            write_atomically(path / "config.toml", folder.resolved.to_toml())
        except (OSError, sqlite3.Error):
            shutil.rmtree(path, ignore_errors=True)  # nothing is in it yet
            raise
        return folder

    @classmethod
    def resume(cls, path: str | Path, config: Config) -> RunFolder:
        """Open a folder to go on with its run.

        Raises
        ------
        InputError
            If it is no run folder, cannot be written, the config is another than the run's, or files of a finished run
            are not as it wrote them.
        """
        path = Path(path)
        database = path / "checkpoint" / "state.sqlite"
        if not any(map(os.path.isfile, (database, database.with_name(PREVIOUS)))):  # unlike Path.is_file, of any string
            raise InputError("--resume", str(path), "is no run folder with a checkpoint; run without --resume")
        checkpoint, note = reopen(database)
        try:
            resolved, moved = _resumable(path, checkpoint, config)
            gone = check_outputs(path, checkpoint.get("outputs", {}))
            write_atomically(path / "config.toml", resolved.to_toml())
            folder = cls(path, resolved, checkpoint, resumed=True)
            folder._rewrite_growing_files()
            if gone:
                folder.finished = False
                folder.tell(
                    f"{gone[0]} of the finished run is gone ({len(gone)} in all): what it made is written again"
                )
            for text in (note, *moved):
                if text:
                    folder.tell(text)
        except InputError:
            checkpoint.close()
            raise
        except OSError as error:
            checkpoint.close()
            if is_full(error):
                raise
            remedy = f"cannot be written ({error.strerror}); make it writable"
            raise InputError("--resume", str(path), remedy) from None
        return folder

    def close(self) -> None:
        """Let go of the log and the checkpoint; what was not committed is dropped."""
        logging.getLogger("fedlora").removeHandler(self._log)
        with suppress(OSError):  # a last line that found no room
            self._log.close()
        self.checkpoint.close()

    def tell(self, note: str) -> None:
        """Log what the user should know, and keep it for the display."""
        log.warning(note)
        self.notes.append(note)

    def discard(self) -> None:
        """Close, and delete the folder if no round was done in it, so that the same command can be given again."""
        done = self.checkpoint.get("round", 0)
        self.close()
        if not done:
            shutil.rmtree(self.path)

    def set_resolved(self, config: Config) -> None:
        """Keep what "auto" became in a round; resuming knows of it when that round is done."""
        self.resolved = config
        self.checkpoint["resolved"] = config.to_toml()
        write_atomically(self.path / "config.toml", config.to_toml())

    def add_round(
        self,
        line: Mapping[str, Any],
        communication: Iterable[Mapping[str, Any]],
        privacy: Iterable[Mapping[str, Any]],
    ) -> None:
        """Commit a round with the checkpoint, then show it in the growing files."""
        new = {
            "rounds.jsonl": [to_json(line)],
            "communication.csv": csv_lines(COMMUNICATION, communication),
            "privacy.csv": csv_lines(PRIVACY, privacy),
        }
        for file, lines in new.items():
            self.checkpoint.add_lines(file, lines)
        self.checkpoint.commit()
        for file, lines in new.items():
            self._append(file, lines)

    def write_partition(
        self, clients: Sequence[str], labels: Sequence[str] | None, counts: Sequence[Sequence[int]]
    ) -> None:
        """Write partition.csv: how many examples of each class each client has; one class without a name, if none."""
        rows = (
            {"client": client, "name": name, "label": labels[i] if labels else "", "examples": count}
            for client, (name, of_client) in enumerate(zip(clients, counts, strict=True))
            for i, count in enumerate(of_client)
        )
        self._write_csv("partition.csv", PARTITION, rows)

    def write_clients(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write clients.csv: how good the final model is on each client's own examples."""
        self._write_csv("clients.csv", CLIENTS, rows)

    def _write_csv(self, file: str, columns: tuple[str, ...], rows: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(f"{line}\n" for line in [",".join(columns), *csv_lines(columns, rows)])
        write_atomically(self.path / file, text)

    def finish(self, summary: Mapping[str, Any]) -> RunResult:
        """Write summary.json and SHA256SUMS, and mark the run as done."""
        write_atomically(self.path / "summary.json", to_json(summary, indent=2) + "\n")
        outputs = find_outputs(self.path)
        write_sums(self.path, outputs)
        self.checkpoint["outputs"] = outputs
        self.checkpoint["finished"] = True
        self.checkpoint.commit()
        self.finished = True
        return self.result()

    def result(self) -> RunResult:
        """Read a finished run's summary.

        Raises
        ------
        InputError
            If it is gone or damaged.
        """
        path = self.path / "summary.json"
        try:
            return RunResult(self.path, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError("--resume", str(path), f"of a finished run cannot be read ({reason}); run anew") from None

    def rounds(self) -> list[dict[str, Any]]:
        """Return the lines of rounds.jsonl."""
        return [json.loads(line) for line in self.checkpoint.lines("rounds.jsonl")]

    def _append(self, file: str, lines: list[str]) -> None:
        path = self.path / file
        header = _header(file)
        start = f"{header}\n" if header and not path.exists() else ""
        with path.open("a", encoding="utf-8") as stream:
            stream.write(start + "".join(f"{line}\n" for line in lines))

    def _rewrite_growing_files(self) -> None:
        # The process may have died between the commit and the files: the checkpoint is what happened.
        for file in ("rounds.jsonl", "communication.csv", "privacy.csv"):
            lines = ([_header(file)] if _header(file) else []) + self.checkpoint.lines(file)
            write_atomically(self.path / file, "".join(f"{line}\n" for line in lines))


@contextmanager
def run_folder(
    path: str | Path, config: Config, resolved: Config | None = None, *, resume: bool = False
) -> Iterator[RunFolder]:
    """Make a run's folder, or open it to go on with its run; close it in the end.

    A new folder in which no round was done goes again if the input turns out to be wrong, or nodes refuse it: the user
    mends what is wrong and gives the same command again.

    Parameters
    ----------
    path : str or Path
    config : Config
        As given.
    resolved : Config, optional
        Of a new folder: with what "auto" and defaults became.
    resume : bool

    Raises
    ------
    InputError
        As :meth:`RunFolder.create` and :meth:`RunFolder.resume` do.
    """
    with writes_to(path, "make room there, then go on with --resume"):
        folder = RunFolder.resume(path, config) if resume else RunFolder.create(path, config, resolved)
        try:
            yield folder
        except (InputError, RefusedError):
            if not resume:
                folder.discard()
            raise
        finally:
            folder.close()


class _Log(logging.FileHandler):
    """A log whose lines are lost where there is no room for them: what matters is in the checkpoint."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


_PLACES = (("data", "name"), ("data", "test"), ("data", "validation"), ("data", "public"), ("model", "name"))
"""Keys that may name a file or folder, whose content the checkpoint knows."""


def _resumable(path: Path, checkpoint: Checkpoint, config: Config) -> tuple[Config, list[str]]:
    """Return the config that the folder's run has, if ``config`` is the one that it was given, and what to tell.

    Files may have moved since: what is in them is compared later.
    """
    given, resolved = checkpoint.get("given"), checkpoint.get("resolved")
    if given is None or resolved is None:
        rounds = path / "rounds.jsonl"
        if rounds.exists() and rounds.stat().st_size:
            raise InputError("--resume", str(path), "has lost its checkpoint; run anew with another --output")
        raise InputError("--resume", str(path), "stopped before it began; delete the folder and run again")
    result, notes = tomllib.loads(resolved), []
    _check_edited(path, result)
    wanted, known = tomllib.loads(config.to_toml()), tomllib.loads(given)
    for section, key in _PLACES:
        now, then = wanted[section].get(key), result[section].get(key)
        if now != then and _is_path(now) and isinstance(then, str) and not is_asset(then):
            notes.append(f"{section}.{key} is {now} now, and was {then}")
            for content in (known, result):
                content[section][key] = now
    given, resolved = (Config.model_validate(content).to_toml() for content in (known, result))
    new = config.to_toml()
    if new not in (given, resolved):
        key, before, after = _difference(tomllib.loads(given), tomllib.loads(new))
        raise InputError(
            key, after, f"differs from the run's {before!r}; resume with the same config, or use a new --output"
        )
    return Config.model_validate(result), notes


def _is_path(value: Any) -> bool:
    try:
        return isinstance(value, str) and not is_asset(value) and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, a home that nobody knows
        return False


def _check_edited(path: Path, resolved: Mapping[str, Any]) -> None:
    """Refuse to go on where somebody wrote another config into the folder, which would be lost."""
    try:
        there = Config.model_validate(read_toml(path / "config.toml"))
    except (OSError, ValueError):  # gone or cut: it is written again
        return
    content, known = tomllib.loads(there.to_toml()), dict(resolved)
    for sections in (content, known):
        # What "auto" became is written before its round is done; and files may move.
        sections["simulation"] = {k: v for k, v in sections["simulation"].items() if k != "cohort_size"}
    for section, key in _PLACES:
        content[section].pop(key, None)
        known[section] = {k: v for k, v in known[section].items() if k != key}
    if content != known:
        key, before, after = _difference(known, content)
        remedy = f"was edited in {path / 'config.toml'}; the run has {before!r}: put it back, or use a new --output"
        raise InputError(key, after, remedy)


def to_json(content: Any, indent: int | None = None) -> str:
    """Write JSON, with null for numbers that are not finite: JSON has no word for them."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _header(file: str) -> str:
    return {"communication.csv": ",".join(COMMUNICATION), "privacy.csv": ",".join(PRIVACY)}.get(file, "")


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before != after:
            if isinstance(before, Mapping) and isinstance(after, Mapping):
                return _difference(before, after, f"{prefix}{key}.")
            return f"{prefix}{key}", before, after
    return prefix.rstrip("."), None, None
