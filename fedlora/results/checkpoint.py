"""The checkpoint for ``--resume``: one SQLite file in which each round is one atomic transaction."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from fedlora.alignment import aligned
from fedlora.errors import InputError
from fedlora.flower import States
from fedlora.results.seal import CHAIN, TABLES, blob_digest, extend_chain, find_damage, is_sealed, write_seal
from fedlora.storage import is_full, storage_error

PREVIOUS = "previous.sqlite"
"""Copy of the checkpoint before its last transaction, in the same folder."""

FORMAT = 1
"""What a checkpoint says of its form: one more with every change that an unfinished run could not resume from."""

_SYNCHRONOUS = "FULL"  # a round that is done stays done when the power goes
_PART_BYTES = 2**28


class DamagedError(InputError):
    """A checkpoint is damaged: its content is not what was written."""


class Checkpoint:
    """The state of a run after its last finished round.

    Parameters
    ----------
    path : Path
        The SQLite file; created if missing.

    Raises
    ------
    InputError
        If another process has it open, or it cannot be opened.
    DamagedError
        If it is no checkpoint, or any byte of it changed since it was written.

    Notes
    -----
    All changes belong to the open transaction until :meth:`commit`; a process that dies earlier leaves the previous
    round. Before a transaction begins, what was committed is copied to :data:`PREVIOUS`, so that a file that
    is damaged later costs one round. Clients' states are read from the file one at a time, so that memory does not grow
    with the federation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._connection = sqlite3.connect(path, timeout=0.0, isolation_level="DEFERRED")
        except sqlite3.OperationalError as error:
            raise InputError("--resume", str(path), f"cannot be opened ({error}); make it writable") from None
        try:
            self._open()
        except BaseException:
            self._connection.close()
            raise
        self.states = States(_StateBlobs(self._connection, self._write))

    def _open(self) -> None:
        path = str(self.path)
        try:
            # Locked until close() or the end of the process, so that two runs cannot mix their rounds in one folder.
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute(f"PRAGMA synchronous = {_SYNCHRONOUS}")
            self._connection.execute("BEGIN EXCLUSIVE")
            new = self._connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None
            self._connection.execute("COMMIT")
            if new:
                self._connection.executescript(f"BEGIN EXCLUSIVE; {TABLES} COMMIT;")
            damage = find_damage(self._connection)
        except sqlite3.Error as error:
            if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise InputError("--resume", path, "another process is at this run; wait for it") from None
            if is_full(error):
                raise
            if storage_error(error) is not None:
                raise InputError("--resume", path, f"cannot be written ({error}); make it writable") from None
            damage = str(error)
        except (ValueError, TypeError, OverflowError, MemoryError) as error:  # a value is no valid text or number
            damage = str(error) or type(error).__name__
        if damage is not None:
            raise DamagedError("--resume", path, f"is damaged ({damage}); run anew with another --output")

    def _write(self, sql: str, *rows: Sequence[Any]) -> None:
        """Execute a statement for each row; before the first of a transaction, copy what was committed."""
        if not self._connection.in_transaction:
            self._keep_previous()
        self._connection.executemany(sql, rows)

    def _keep_previous(self) -> None:
        if not is_sealed(self._connection) or not self.path.exists():  # nothing committed, or in memory
            return
        new = self.path.with_name(f".{PREVIOUS}.new")
        try:
            with closing(sqlite3.connect(new)) as copy:
                # SQLite's backup function: opening the file a second time would release its lock.
                copy.execute("PRAGMA synchronous = OFF")
                self._connection.backup(copy)
            os.replace(new, self.path.with_name(PREVIOUS))
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def forget_previous(self) -> None:
        """Delete the copy made before the last transaction."""
        self.path.with_name(PREVIOUS).unlink(missing_ok=True)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set a fact: any JSON value, or a number that is not finite, since a ledger needs infinity."""
        self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def get(self, name: str, default: Any = None) -> Any:
        """Return a fact."""
        row = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def set_arrays(self, name: str, arrays: Mapping[str, torch.Tensor]) -> None:
        """Set named tensors."""
        self._write("DELETE FROM arrays WHERE name = ?", (name,))
        for part, chunk in enumerate(_chunks(arrays)):
            blob = save(chunk)
            self._write("INSERT INTO arrays VALUES (?, ?, ?, ?)", (name, part, blob_digest(blob), blob))

    def get_arrays(self, name: str) -> dict[str, torch.Tensor] | None:
        """Return named tensors, or None."""
        rows = self._connection.execute("SELECT value FROM arrays WHERE name = ? ORDER BY part", (name,))
        chunks = [load(value) for (value,) in rows]
        return {key: aligned(array) for chunk in chunks for key, array in chunk.items()} if chunks else None

    def add_lines(self, file: str, lines: list[str]) -> None:
        """Append lines to one of the run folder's growing files."""
        self._write("INSERT INTO lines VALUES (?, ?)", *((file, line) for line in lines))
        self[f"{CHAIN}{file}"] = extend_chain(self.get(f"{CHAIN}{file}", ""), lines)

    def lines(self, file: str) -> list[str]:
        """Return all lines of a growing file, in order."""
        rows = self._connection.execute("SELECT line FROM lines WHERE file = ? ORDER BY rowid", (file,))
        return [line for (line,) in rows]

    def commit(self) -> None:
        """End the transaction; a resumed run starts from here."""
        if self._connection.in_transaction:
            write_seal(self._connection)
        self._connection.commit()

    def close(self) -> None:
        """Close the file and drop an unfinished transaction."""
        self._connection.close()


def reopen(path: Path) -> tuple[Checkpoint, str | None]:
    """Open a run's checkpoint to resume it; if it is damaged, go back to the previous round.

    Parameters
    ----------
    path : Path
        The SQLite file.

    Returns
    -------
    (Checkpoint, str or None)
        The text is a note for the user, if the previous round was restored. The damaged file is kept beside it.

    Raises
    ------
    InputError
        As :class:`Checkpoint`, if there is no previous round.
    """
    before = path.with_name(PREVIOUS)
    try:
        if not path.exists():
            raise DamagedError("--resume", str(path), "is gone; run anew with another --output")
        checkpoint = Checkpoint(path)
        if checkpoint.get("given") is not None or not before.exists():
            return checkpoint, None
        checkpoint.close()
        raise DamagedError("--resume", str(path), "is damaged (it is empty); run anew with another --output")
    except DamagedError as error:
        done = _rounds_in(before)
        if not done:
            raise
        why = error.remedy.partition(";")[0]
    aside, number = path.with_name(f"damaged-{path.name}"), 2
    while aside.exists():
        aside, number = path.with_name(f"damaged-{number}-{path.name}"), number + 1
    copy = path.with_name(f".{path.name}.new")
    shutil.copyfile(before, copy)
    # SQLite would replay the damaged file's journal into the copy.
    for end in ("-journal", "-wal", "-shm", ""):
        if path.with_name(path.name + end).exists():
            os.replace(path.with_name(path.name + end), aside.with_name(aside.name + end))
    os.replace(copy, path)
    return Checkpoint(path), f"{path} {why}; going on after round {done}, the last that is whole"


def _rounds_in(path: Path) -> int:
    """Return the number of rounds in a copy of a checkpoint; 0 if it is missing or damaged."""
    if not path.exists():
        return 0
    try:
        with closing(Checkpoint(path)) as checkpoint:
            return int(checkpoint.get("round", 0))
    except InputError:
        return 0


def _chunks(arrays: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Divide arrays into pieces of some hundred MB, at least one, since SQLite takes no value above 1 GB."""
    chunk: dict[str, torch.Tensor] = {}
    size = 0
    for name, array in arrays.items():
        if chunk and size + array.nbytes > _PART_BYTES:
            yield chunk
            chunk, size = {}, 0
        chunk[name] = array
        size += array.nbytes
    yield chunk


class _StateBlobs(MutableMapping[int, bytes]):
    """Bytes of each client's ``context.state``, stored in the checkpoint."""

    def __init__(self, connection: sqlite3.Connection, write: Callable[..., None]) -> None:
        self._connection, self._write = connection, write

    def __getitem__(self, client: int) -> bytes:
        row = self._connection.execute("SELECT state FROM states WHERE client = ?", (client,)).fetchone()
        if row is None:
            raise KeyError(client)
        return bytes(row[0])

    def __setitem__(self, client: int, blob: bytes) -> None:
        self._write("INSERT OR REPLACE INTO states VALUES (?, ?, ?)", (client, blob_digest(blob), blob))

    def __delitem__(self, client: int) -> None:
        self._write("DELETE FROM states WHERE client = ?", (client,))

    def __iter__(self) -> Iterator[int]:
        for (client,) in self._connection.execute("SELECT client FROM states ORDER BY client"):
            yield client

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM states").fetchone()[0])
