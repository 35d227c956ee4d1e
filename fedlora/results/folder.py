"""The run folder: all results of a run, written atomically, so that a killed process leaves no half-written file."""

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
from pathlib import Path
from typing import Any

from fedlora.assets import is_asset
from fedlora.config import Config, read_toml
from fedlora.csv_files import csv_lines
from fedlora.errors import InputError, RefusedError
from fedlora.methods import BEST, get_method
from fedlora.results.checkpoint import FORMAT, PREVIOUS, Checkpoint, reopen
from fedlora.results.finished import RunResult
from fedlora.results.outputs import check_outputs, find_outputs, write_sums
from fedlora.storage import is_full, writes_to

log = logging.getLogger("fedlora")

COMMUNICATION = ("round", "client", "direction", "payload_bytes", "message_bytes", "formula_bytes")
PARTITION = ("client", "name", "label", "examples")
PRIVACY = ("round", "client", "steps", "sample_rate", "noise_multiplier", "epsilon", "delta")
LEFT_OUT = ("round", "attempt", "client", "code", "reason")
_COLUMNS = {"communication.csv": COMMUNICATION, "privacy.csv": PRIVACY, "left_out.csv": LEFT_OUT}
"""Of the files that grow by rows."""


class RunFolder:
    """Writes a run's files.

    Parameters
    ----------
    path : Path
    config : Config
        As given; ``resolved`` may differ where the config says "auto".

    Attributes
    ----------
    checkpoint : Checkpoint
    resolved : Config
        The run's config; on resume, the folder's.
    resumed : bool
        Whether the folder was opened to resume its run.
    finished : bool
        Whether the run is done and all its output exists.
    notes : list of str
        Notes for the user on the resumed run.
    user_code : dict
        The part of summary.json on a user's own strategy and client.
    """

    def __init__(self, path: Path, config: Config, checkpoint: Checkpoint, resumed: bool = False) -> None:
        self.path, self.checkpoint, self.resumed = path, checkpoint, resumed
        self.resolved = config
        self.notes: list[str] = []
        self.user_code: dict[str, Any] = {}
        self.finished = bool(checkpoint.get("finished", False))

    def _start_log(self) -> None:
        """Log into the folder until :meth:`close`: last of all, since who opens a folder in vain does not close it."""
        self._log = _Log(self.path / "run.log", encoding="utf-8")
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
            With the values chosen for "auto" and defaults.

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
            remedy = "exists already; choose another folder, or continue with --resume"
            raise InputError("--output", str(path), remedy) from None
        except (OSError, ValueError) as error:
            remedy = f"cannot be made ({getattr(error, 'strerror', error)}); choose another folder"
            raise InputError("--output", str(path), remedy) from None
        try:
            folder = cls(path, config, Checkpoint(path / "checkpoint" / "state.sqlite"))
            folder.resolved = resolved or config
            folder.checkpoint["format"] = FORMAT
            folder.checkpoint["given"] = config.to_toml()
            folder.checkpoint["resolved"] = folder.resolved.to_toml()
            folder.checkpoint.commit()
            write_atomically(path / "config.toml", folder.resolved.to_toml())
            folder._start_log()
        except (OSError, sqlite3.Error):
            shutil.rmtree(path, ignore_errors=True)  # nothing is in it yet
            raise
        return folder

    @classmethod
    def resume(cls, path: str | Path, config: Config) -> RunFolder:
        """Open a folder to resume its run.

        Raises
        ------
        InputError
            If it is no run folder, cannot be written, the config differs from the run's, files of a finished run were
            changed, or an unfinished run is of a version with other checkpoints.
        """
        path = Path(path)
        database = path / "checkpoint" / "state.sqlite"
        if not any(map(os.path.isfile, (database, database.with_name(PREVIOUS)))):  # accepts any string
            raise InputError("--resume", str(path), "is no run folder with a checkpoint; run without --resume")
        checkpoint, note = reopen(database)
        try:
            resolved, moved = _resumable(path, checkpoint, config)
            gone = check_outputs(path, checkpoint.get("outputs", {}))
            if checkpoint.get("format") != FORMAT and (gone or not checkpoint.get("finished", False)):
                remedy = "was begun by another version of fedlora; resume it with that one, or run anew"
                raise InputError("--resume", str(path), f"{remedy} with another --output")
            write_atomically(path / "config.toml", resolved.to_toml())
            folder = cls(path, resolved, checkpoint, resumed=True)
            folder._rewrite_growing_files()
            folder._start_log()
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
        """Close the log and the checkpoint; drop what was not committed."""
        logging.getLogger("fedlora").removeHandler(self._log)
        with suppress(OSError):  # the disk had no room for the last line
            self._log.close()
        self.checkpoint.close()

    def tell(self, note: str) -> None:
        """Log a note for the user, and keep it for the display."""
        log.warning(note)
        self.notes.append(note)

    def discard(self) -> None:
        """Close, and delete the folder if it holds no round or part of a start, so that the command can be repeated."""
        done = self.checkpoint.get("round", 0) or self.checkpoint.get("gathered", 0)
        self.close()
        if not done:
            shutil.rmtree(self.path)

    def set_resolved(self, config: Config) -> None:
        """Store the config with the value that "auto" took in a round; it counts on resume once that round is done."""
        self.resolved = config
        self.checkpoint["resolved"] = config.to_toml()
        write_atomically(self.path / "config.toml", config.to_toml())

    def add_round(
        self,
        line: Mapping[str, Any],
        communication: Iterable[Mapping[str, Any]],
        privacy: Iterable[Mapping[str, Any]],
        left_out: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Commit a round to the checkpoint, then append it to the growing files."""
        rows = _lines(communication, privacy, left_out)
        self._add({"rounds.jsonl": [to_json(line)], **rows})

    def add_start(self, communication: Iterable[Mapping[str, Any]], privacy: Iterable[Mapping[str, Any]]) -> None:
        """Do so with an exchange before the first round, which has no line in rounds.jsonl."""
        self._add(_lines(communication, privacy, ()))

    def add_attempt(
        self,
        communication: Iterable[Mapping[str, Any]],
        privacy: Iterable[Mapping[str, Any]],
        left_out: Iterable[Mapping[str, Any]],
    ) -> None:
        """Do so with an attempt at a round that failed, which has no line in rounds.jsonl either."""
        self._add(_lines(communication, privacy, left_out))

    def _add(self, new: Mapping[str, list[str]]) -> None:
        for file, lines in new.items():
            self.checkpoint.add_lines(file, lines)
        self.checkpoint.commit()
        for file, lines in new.items():
            self._append(file, lines)

    def write_partition(
        self, clients: Sequence[str], labels: Sequence[str] | None, counts: Sequence[Sequence[int]]
    ) -> None:
        """Write partition.csv: each client's number of examples by class; one unnamed class if there are no classes."""
        rows = (
            {"client": client, "name": name, "label": labels[i] if labels else "", "examples": count}
            for client, (name, of_client) in enumerate(zip(clients, counts, strict=True))
            for i, count in enumerate(of_client)
        )
        self._write_csv("partition.csv", PARTITION, rows)

    def write_clients(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write clients.csv: metrics of the final model on each client's own examples."""
        self._write_csv("clients.csv", tuple(rows[0]), rows)

    def _write_csv(self, file: str, columns: tuple[str, ...], rows: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(f"{line}\n" for line in [",".join(columns), *csv_lines(columns, rows)])
        write_atomically(self.path / file, text)

    def finish(self, summary: Mapping[str, Any]) -> RunResult:
        """Write summary.json and SHA256SUMS, and mark the run as done."""
        write_atomically(self.path / "summary.json", to_json({**summary, **self.user_code}, indent=2) + "\n")
        parts = get_method(self.resolved.method.name).outputs
        outputs = find_outputs(self.path, [*parts, *(f"{BEST}/{part}" for part in parts)])
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
            If it is missing or damaged.
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
        # The process may have died between commit and files: the checkpoint is right.
        for file in ("rounds.jsonl", *_COLUMNS):
            known = self.checkpoint.lines(file)
            if file == "left_out.csv" and not known:  # most runs leave nobody out
                continue
            lines = ([_header(file)] if _header(file) else []) + known
            write_atomically(self.path / file, "".join(f"{line}\n" for line in lines))


@contextmanager
def run_folder(
    path: str | Path, config: Config, resolved: Config | None = None, *, resume: bool = False
) -> Iterator[RunFolder]:
    """Create a run folder, or open it to resume its run; close it at the end.

    A new folder without a round is deleted again if the input turns out to be wrong or nodes refuse it, so that the
    user can fix the mistake and repeat the command.

    Parameters
    ----------
    path : str or Path
    config : Config
        As given.
    resolved : Config, optional
        For a new folder: with the values chosen for "auto" and defaults.
    resume : bool

    Raises
    ------
    InputError
        As :meth:`RunFolder.create` and :meth:`RunFolder.resume` do.
    """
    with writes_to(path, "make room there, then continue with --resume"):
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
    """A log that drops its lines when the disk is full: what matters is in the checkpoint."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


_PLACES = (("data", "name"), ("data", "test"), ("data", "validation"), ("data", "public"), ("model", "name"))
"""Keys that may name a file or folder; the checkpoint has a digest of its content."""

_CHOSEN = (
    ("simulation", "cohort_size"),
    ("client", "physical_batch_size"),
    ("client", "gradient_checkpointing"),
)
"""Keys that a run may choose or lower in a round."""


def _resumable(path: Path, checkpoint: Checkpoint, config: Config) -> tuple[Config, list[str]]:
    """Return the config of the folder's run, and a note. ``config`` must be the one that the run was given.

    Files may have moved since; their content is compared later.
    """
    given, resolved = checkpoint.get("given"), checkpoint.get("resolved")
    if given is None or resolved is None:
        rounds = path / "rounds.jsonl"
        if rounds.exists() and rounds.stat().st_size:
            raise InputError("--resume", str(path), "has lost its checkpoint; run anew with another --output")
        raise InputError("--resume", str(path), "stopped before it began; delete the folder and run again")
    result, notes = tomllib.loads(resolved), []
    _check_edited(path, result)
    from fedlora.data.sources import with_absolute_paths  # late: it takes a second

    wanted, known = tomllib.loads(config.to_toml()), tomllib.loads(given)
    places = tomllib.loads(with_absolute_paths(config).to_toml())
    for section, key in _PLACES:
        now, then = places[section].get(key), result[section].get(key)
        if not _is_path(now) or not isinstance(then, str) or is_asset(then):
            continue
        known[section][key] = wanted[section][key]  # by whatever name, from whatever folder
        if now != then:
            notes.append(f"{section}.{key} is {now} now, and was {then}")
            result[section][key] = now
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
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, or an unknown home
        return False


def _check_edited(path: Path, resolved: Mapping[str, Any]) -> None:
    """Refuse to resume if somebody changed the folder's config.toml, since that change would be lost."""
    try:
        there = Config.model_validate(read_toml(path / "config.toml"))
    except (OSError, ValueError):  # missing or cut off: it is written again
        return
    content, known = (tomllib.loads(config.to_toml()) for config in (there, Config.model_validate(resolved)))
    for sections in (content, known):
        # What "auto" became is written before its round is done, and files may move.
        for section, key in _CHOSEN:
            sections[section].pop(key, None)
    for section, key in _PLACES:
        content[section].pop(key, None)
        known[section] = {k: v for k, v in known[section].items() if k != key}
    if content != known:
        key, before, after = _difference(known, content)
        remedy = f"was edited in {path / 'config.toml'}; the run has {before!r}: put it back, or use a new --output"
        raise InputError(key, after, remedy)


def to_json(content: Any, indent: int | None = None) -> str:
    """Write JSON, with null for numbers that are not finite, which JSON cannot express."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _header(file: str) -> str:
    return ",".join(_COLUMNS.get(file, ()))


def _lines(*rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return lines by file, given the rows of each; nothing of left_out.csv where there are none."""
    found = {file: csv_lines(columns, of) for (file, columns), of in zip(_COLUMNS.items(), rows, strict=True)}
    return {file: lines for file, lines in found.items() if lines or file != "left_out.csv"}


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before != after:
            if isinstance(before, Mapping) and isinstance(after, Mapping):
                return _difference(before, after, f"{prefix}{key}.")
            return f"{prefix}{key}", before, after
    return prefix.rstrip("."), None, None
