"""What ``--resume`` needs, in one SQLite file: a round is one transaction, so it is there whole or not at all."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from safetensors.torch import load, save

from fedlora.alignment import aligned
from fedlora.errors import InputError

_PART_BYTES = 2**28

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS arrays (name TEXT, part INTEGER, value BLOB NOT NULL, PRIMARY KEY (name, part));
CREATE TABLE IF NOT EXISTS states (client INTEGER PRIMARY KEY, state BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS lines (file TEXT NOT NULL, line TEXT NOT NULL);
"""


class Checkpoint:
    """The state of a run after its last finished round.

    Parameters
    ----------
    path : Path
        The SQLite file; made if it is not there.

    Raises
    ------
    InputError
        If another process has it open, it cannot be opened, or it is no checkpoint.

    Notes
    -----
    Everything that is set belongs to the running transaction until :meth:`commit`; a process that dies before leaves
    the round before. Clients' states are read from the file one at a time, so that memory does not grow with the
    federation.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._connection = sqlite3.connect(path, timeout=0.0, isolation_level="DEFERRED")
        except sqlite3.OperationalError as error:
            raise InputError("--resume", str(path), f"cannot be opened ({error}); make it writable") from None
        try:
            # The lock lasts until close() or the end of the process: two runs in one folder would mix their rounds.
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.executescript(f"BEGIN EXCLUSIVE; {_TABLES} COMMIT;")
        except sqlite3.DatabaseError as error:
            self._connection.close()
            locked = "locked" in str(error)
            remedy = "another process is at this run; wait for it" if locked else f"is damaged ({error}); run anew"
            raise InputError("--resume", str(path), remedy) from None
        self.states = ClientStates(self._connection)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set a fact; any JSON value, or a number that is not finite: a ledger needs infinity."""
        self._connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def get(self, name: str, default: Any = None) -> Any:
        """Return a fact."""
        row = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def set_arrays(self, name: str, arrays: Mapping[str, torch.Tensor]) -> None:
        """Set named tensors."""
        self._connection.execute("DELETE FROM arrays WHERE name = ?", (name,))
        for part, chunk in enumerate(_chunks(arrays)):
            self._connection.execute("INSERT INTO arrays VALUES (?, ?, ?)", (name, part, save(chunk)))

    def get_arrays(self, name: str) -> dict[str, torch.Tensor] | None:
        """Return named tensors, or None."""
        rows = self._connection.execute("SELECT value FROM arrays WHERE name = ? ORDER BY part", (name,))
        chunks = [load(value) for (value,) in rows]
        return {key: aligned(array) for chunk in chunks for key, array in chunk.items()} if chunks else None

    def add_lines(self, file: str, lines: list[str]) -> None:
        """Add lines to one of the run folder's growing files."""
        self._connection.executemany("INSERT INTO lines VALUES (?, ?)", [(file, line) for line in lines])

    def lines(self, file: str) -> list[str]:
        """Return all lines of a growing file, in order."""
        rows = self._connection.execute("SELECT line FROM lines WHERE file = ? ORDER BY rowid", (file,))
        return [line for (line,) in rows]

    def commit(self) -> None:
        """End the transaction: what was set since the last one is now what a resumed run starts from."""
        self._connection.commit()

    def close(self) -> None:
        """Close the file; an unfinished transaction is dropped."""
        self._connection.close()


def _chunks(arrays: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Divide arrays into pieces of some hundred MB: SQLite takes no value above 1 GB. There is one piece at least."""
    chunk: dict[str, torch.Tensor] = {}
    size = 0
    for name, array in arrays.items():
        if chunk and size + array.nbytes > _PART_BYTES:
            yield chunk
            chunk, size = {}, 0
        chunk[name] = array
        size += array.nbytes
    yield chunk


class ClientStates(MutableMapping[int, RecordDict]):
    """Every client's ``context.state``, by client, in the checkpoint."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __getitem__(self, client: int) -> RecordDict:
        row = self._connection.execute("SELECT state FROM states WHERE client = ?", (client,)).fetchone()
        if row is None:
            raise KeyError(client)
        return recorddict_from_proto(ProtoRecordDict.FromString(row[0]))

    def __setitem__(self, client: int, state: RecordDict) -> None:
        blob = recorddict_to_proto(state).SerializeToString()
        self._connection.execute("INSERT OR REPLACE INTO states VALUES (?, ?)", (client, blob))

    def __delitem__(self, client: int) -> None:
        self._connection.execute("DELETE FROM states WHERE client = ?", (client,))

    def __iter__(self) -> Iterator[int]:
        for (client,) in self._connection.execute("SELECT client FROM states ORDER BY client"):
            yield client

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM states").fetchone()[0])
