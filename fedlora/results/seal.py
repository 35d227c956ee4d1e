"""The checkpoint's seal: one digest of all its content, written in the same transaction.

Every blob lies beside its own SHA-256. The seal is the SHA-256 of these digests, of all facts, and of the keys, so that
a changed byte, a row that is gone and a row too many all show when the checkpoint is opened again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable

TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE arrays (name TEXT, part INTEGER, digest BLOB NOT NULL, value BLOB NOT NULL, PRIMARY KEY (name, part));
CREATE TABLE states (client INTEGER PRIMARY KEY, digest BLOB NOT NULL, state BLOB NOT NULL);
CREATE TABLE lines (file TEXT NOT NULL, line TEXT NOT NULL);
CREATE TABLE seal (only INTEGER PRIMARY KEY, digest BLOB NOT NULL);
"""

CHAIN = "digest of lines of "
"""Prefix of the fact that holds the digest of a growing file's lines."""

_SEALED = (
    "SELECT name, value FROM facts ORDER BY name",
    "SELECT name, part, digest FROM arrays ORDER BY name, part",
    "SELECT client, digest FROM states ORDER BY client",
)
_BLOBS = (
    "SELECT digest, value, name || ' in the arrays' FROM arrays",
    "SELECT digest, state, 'the state of client ' || client FROM states",
)


def blob_digest(blob: bytes) -> bytes:
    """SHA-256 of a blob."""
    return hashlib.sha256(blob).digest()


def extend_chain(chain: str, lines: Iterable[str]) -> str:
    """Return the digest of lines, chained to the digest of the lines before them ("" for none)."""
    for line in lines:
        chain = hashlib.sha256(f"{chain}\n{line}".encode()).hexdigest()
    return chain


def write_seal(connection: sqlite3.Connection) -> None:
    """Write the seal of the open transaction."""
    connection.execute("INSERT OR REPLACE INTO seal VALUES (0, ?)", (_seal(connection),))


def is_sealed(connection: sqlite3.Connection) -> bool:
    """Whether the checkpoint holds a committed transaction."""
    return connection.execute("SELECT 1 FROM seal").fetchone() is not None


def find_damage(connection: sqlite3.Connection) -> str | None:
    """Return what is wrong with a checkpoint, or None.

    Everything is read once. SQLite's own errors, and whatever else a damaged file makes it raise, are passed on.
    """
    (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        return str(found)
    for query in _BLOBS:
        for digest, blob, what in connection.execute(query):
            if not isinstance(blob, bytes) or blob_digest(blob) != digest:
                return f"{what} differs from its digest"
    chains: dict[str, str] = {}
    for file, line in connection.execute("SELECT file, line FROM lines ORDER BY rowid"):
        chains[file] = extend_chain(chains.get(file, ""), [line])
    facts = connection.execute("SELECT name, value FROM facts")
    noted = {name.removeprefix(CHAIN): json.loads(value) for name, value in facts if name.startswith(CHAIN)}
    if chains != {file: chain for file, chain in noted.items() if chain}:
        return "lines of the growing files differ from their digest"
    sealed = connection.execute("SELECT digest FROM seal").fetchall()
    anything = any(connection.execute(query).fetchone() for query in _SEALED)
    if sealed != ([(_seal(connection),)] if sealed or anything else []):
        return "facts or rows are gone or changed"
    return None


def _seal(connection: sqlite3.Connection) -> bytes:
    sha = hashlib.sha256()
    for query in _SEALED:
        for row in connection.execute(query):
            sha.update(repr(row).encode())
        sha.update(b"\n")
    return sha.digest()
