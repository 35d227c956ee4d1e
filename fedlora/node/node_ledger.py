"""The data owner's ledger: one file on the owner's disk that covers all runs and restarts.

Every training step is written to disk before it reads an example. Whenever the node stops, the ledger therefore holds
exactly the steps that were begun. No step begins that would exceed the owner's ceiling.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedlora.errors import BudgetError, GuardError, InputError, PolicyError, StaleError
from fedlora.node.config import PolicySection
from fedlora.privacy import Ledger, PrivacyPlan
from fedlora.privacy.accountants import Steps, group_of, steps_of
from fedlora.privacy.calibration import spent_epsilon

Kind = tuple[float, float, int]
"""Noise multiplier, sample rate, and how many examples of a unit can be in a step."""

# Limits on what servers can make a ledger store: characters of a name, and runs that never took a step.
_LONGEST_NAME = 200
_LONGEST_LABELS = 100_000
_IDLE_RUNS = 200
_DAY = 86400.0
_SYNCHRONOUS = "EXTRA"  # what is charged stays charged when the power goes

_TABLES = """
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY, run TEXT UNIQUE NOT NULL, federation TEXT NOT NULL, label_names TEXT,
    last_round INTEGER NOT NULL DEFAULT 0, described_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
CREATE TABLE IF NOT EXISTS charges (
    number INTEGER PRIMARY KEY, run TEXT NOT NULL, federation TEXT NOT NULL, round INTEGER NOT NULL,
    noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL, steps INTEGER NOT NULL,
    begun_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, group_size INTEGER NOT NULL DEFAULT 1,
    unit TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS seals (of TEXT PRIMARY KEY, digest TEXT NOT NULL);
"""
# An older ledger lacks this table or these columns, which are then added.
_DESCRIBES = "CREATE TABLE IF NOT EXISTS describes (number INTEGER PRIMARY KEY, at REAL NOT NULL)"
_ASKED = "ALTER TABLE describes ADD COLUMN asked TEXT NOT NULL DEFAULT 'describe'"
_OF_RUNS = ("config", "name")
_UNITS = (
    "ALTER TABLE charges ADD COLUMN group_size INTEGER NOT NULL DEFAULT 1",
    "ALTER TABLE charges ADD COLUMN unit TEXT NOT NULL DEFAULT ''",
)

_CHARGES = "number, run, federation, round, noise_multiplier, sample_rate, steps"
_SEALED = {
    "runs": "SELECT number, run, federation, label_names, last_round FROM runs WHERE number >= ? ORDER BY number",
    "charges": f"SELECT {_CHARGES}, group_size, unit FROM charges WHERE number >= ? ORDER BY number",
}
_SEALED_BEFORE_UNITS = _SEALED | {"charges": f"SELECT {_CHARGES} FROM charges WHERE number >= ? ORDER BY number"}
"""Queries for the rows that each seal covers: its SHA-256 shows a row that is missing or changed."""


@dataclass(frozen=True)
class Served:
    """What a node did for one federation: a run folder of a server, over all its resumes.

    Attributes
    ----------
    federation : str
    name : str
        What its server calls the run; "" where a ledger of an earlier version does not say.
    rounds : int
        The last round, or exchange, that was begun here.
    steps : int
        Training steps, or updates with noise, that were charged.
    epsilon : float
        Of its steps alone.
    total : float
        Epsilon of its steps and those of all federations before it.
    left : float or None
        What is left of the owner's ceiling after these; None where there is none.
    described_at, begun_at : str or None
        When a server first described it, and when its last round began, in UTC; None where no round did.
    """

    federation: str
    name: str
    rounds: int
    steps: int
    epsilon: float
    total: float
    left: float | None
    described_at: str
    begun_at: str | None


class NodeLedger:
    """History of all steps ever taken on a node's examples, and of the runs that asked for them.

    Parameters
    ----------
    directory : Path
        Folder of ``ledger.sqlite``; created if missing, readable by its owner only.
    policy : PolicySection
        The owner's ceiling, and the delta and accountant used to compute epsilon.
    unit : str, optional
        The column of the persons that are protected; by default single examples are.

    Raises
    ------
    InputError
        If the ledger cannot be read or written, or a row of it is missing or changed. Nothing is trained then.

    Notes
    -----
    A federation is one run folder of a server. It has one run on the SuperLink, and another after each resume.
    A step without noise has noise multiplier 0 and makes epsilon infinite. The file is an
    SQLite database, so changes are atomic. Only one process at a time trains on the node; its lock ends with it.
    """

    def __init__(self, directory: Path, policy: PolicySection, unit: str | None = None) -> None:
        self.policy, self.unit = policy, unit or ""
        self.path = directory / "ledger.sqlite"
        self._lock = FileLock(directory / "ledger.lock", mode=0o600)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self.path.exists():
                self._create()
            os.close(os.open(self.path, os.O_RDWR))
        except OSError as error:
            remedy = f"cannot hold the node's ledger ({error.strerror}); give a folder that can be written"
            raise InputError("state.directory", str(directory), remedy) from None
        self._check()

    def _check(self) -> None:
        """Refuse a damaged ledger."""
        with self._transaction() as database:
            found = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            lost = not found >= {"runs", "charges", "seals"}
            sealed = _SEALED if "unit" in _columns(database, "charges") else _SEALED_BEFORE_UNITS
            damaged = not lost and (
                database.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",)
                or dict(database.execute("SELECT of, digest FROM seals"))
                != {of: _sealing(database, of, sealed=sealed).hexdigest() for of in sealed}
            )
        if lost:
            remedy = "has lost its content; restore a copy, or delete it if nothing was ever trained here"
            raise InputError("state.directory", str(self.path), remedy)
        if damaged:
            remedy = "is damaged: rows are missing or changed, so what was spent is unknown; restore a copy of it"
            raise InputError("state.directory", str(self.path), remedy)
        with self._transaction() as database:
            if "describes" not in found:
                database.execute(_DESCRIBES)
            if "asked" not in _columns(database, "describes"):
                database.execute(_ASKED)
            known = _columns(database, "runs")
            for column in _OF_RUNS:
                if column not in known:
                    database.execute(f"ALTER TABLE runs ADD COLUMN {column} TEXT")
            if "unit" not in _columns(database, "charges"):
                for added in _UNITS:
                    database.execute(added)
                _seal(database, "charges", _sealing(database, "charges"))

    def _create(self) -> None:
        """Create a ledger without charges in one transaction, so that an empty file is recognised as a lost ledger."""
        new = self.path.with_suffix(".new")
        with self._lock:
            if self.path.exists():
                return
            new.unlink(missing_ok=True)
            os.close(os.open(new, os.O_RDWR | os.O_CREAT, 0o600))
            with self._open(new) as database:
                database.executescript(_TABLES)
                for of in _SEALED:
                    _seal(database, of, _sealing(database, of))
            os.replace(new, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def count_describe(self) -> None:
        """Record that a server asks what the node holds, for whichever federation.

        Raises
        ------
        PolicyError
            If servers used up the owner's limit within the last 24 hours.
        """
        self._count("describe", "max_describes_per_day", self.policy.max_describes_per_day)

    def count_evaluation(self) -> None:
        """Record that a server has the node evaluate a model, for whichever federation.

        Raises
        ------
        PolicyError
            If the owner allows none, or servers used up the owner's limit within the last 24 hours.
        """
        self._count("evaluate", "max_evaluations_per_day", self.policy.max_evaluations_per_day)

    def _count(self, asked: str, key: str, most: int) -> None:
        now = time.time()
        with self._transaction() as database:
            database.execute("DELETE FROM describes WHERE at < ?", (now - _DAY,))
            (count,) = database.execute("SELECT COUNT(*) FROM describes WHERE asked = ?", (asked,)).fetchone()
            if count < most:
                database.execute("INSERT INTO describes (at, asked) VALUES (?, ?)", (now, asked))
        if count >= most:
            raise PolicyError(key, most, "more")

    def register(
        self, federation: str, run: str, label_names: list[str] | None, config: str = "", name: str = ""
    ) -> None:
        """Record a run that a server describes; this ends an earlier run of the same federation.

        If there are many runs that never took a step, the oldest of them are deleted.

        Parameters
        ----------
        federation, run : str
        label_names : list of str, optional
        config : str
            A digest of the run's config. Later messages must come with the same config.
        name : str
            What the server calls the run, for the owner to read.

        Raises
        ------
        StaleError
            If a later run of the same federation was already described, or this one with another config or classes.
        InputError
            If the names are longer than those of any honest server.
        """
        if max(len(federation), len(run), len(name)) > _LONGEST_NAME or len(json.dumps(label_names)) > _LONGEST_LABELS:
            raise InputError("label-names", federation[:_LONGEST_NAME], "names are too long")
        with self._transaction() as database:
            database.execute(
                "DELETE FROM runs WHERE last_round = 0 AND number <= "
                "(SELECT number FROM runs WHERE last_round = 0 ORDER BY number DESC LIMIT 1 OFFSET ?)",
                (_IDLE_RUNS,),
            )
            database.execute(
                "INSERT INTO runs (run, federation, label_names, config, name) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (run) DO UPDATE SET config = excluded.config WHERE config IS NULL",
                (run, federation, json.dumps(label_names), config, name),
            )
            _seal(database, "runs", _sealing(database, "runs"))
            _check_newest(database, federation, run)
            (names,) = database.execute("SELECT label_names FROM runs WHERE run = ?", (run,)).fetchone()
            _check_config(database, run, config)
            if json.loads(names) != label_names:
                raise StaleError("the run was described with other classes before")

    def label_names(self, federation: str, run: str) -> list[str] | None:
        """Return the classes with which a run was described; None for a language model.

        Raises
        ------
        StaleError
            If the run was never described here, or is not the newest of its federation.
        """
        with self._transaction() as database:
            _check_newest(database, federation, run)
            (names,) = database.execute("SELECT label_names FROM runs WHERE run = ?", (run,)).fetchone()
        found: list[str] | None = json.loads(names)
        return found

    def check_config(self, run: str, config: str) -> None:
        """Refuse a message that comes with another config than the run was described with.

        Raises
        ------
        StaleError
        """
        with self._transaction() as database:
            _check_config(database, run, config)

    def check_round(self, run: str, server_round: int) -> None:
        """Refuse a round that already began here, or that is older than one that did.

        Raises
        ------
        StaleError
        """
        with self._transaction() as database:
            _check_round(database, run, server_round)

    def history(self, federation: str | None = None) -> list[Steps]:
        """Return the steps of all runs, or of one federation, by noise multiplier and sample rate."""
        where, values = ("WHERE federation = ?", (federation,)) if federation is not None else ("", ())
        with self._transaction() as database:
            rows = database.execute(
                f"SELECT noise_multiplier, sample_rate, SUM(steps), group_size FROM charges {where} "
                "GROUP BY 1, 2, 4 ORDER BY 1, 2, 4",
                values,
            ).fetchall()
        return [steps_of(float(sigma), float(rate), int(steps), int(group)) for sigma, rate, steps, group in rows]

    def served(self) -> list[Served]:
        """Return what every federation was given, in the order in which they were first described."""
        with self._transaction() as database:
            rows = database.execute(
                "SELECT federation, MAX(name), MAX(last_round), MIN(described_at), "
                "(SELECT MAX(begun_at) FROM charges WHERE charges.federation = runs.federation) "
                "FROM runs GROUP BY federation ORDER BY MIN(number)"
            ).fetchall()
        found: list[Served] = []
        so_far: list[Steps] = []
        for federation, name, rounds, described, begun in rows:
            history = self.history(federation)
            so_far += history
            steps, total = sum(entry[2] for entry in history), self._epsilon(so_far)
            numbers = int(rounds), steps, self._epsilon(history), total, self._left(total)
            found.append(Served(federation, name or "", *numbers, described, begun))
        return found

    def steps(self) -> int:
        """Return the number of steps ever begun."""
        return sum(entry[2] for entry in self.history())

    def epsilon(self) -> float:
        """Return the epsilon of all runs together at the owner's delta."""
        return self._epsilon(self.history())

    def left(self) -> float | None:
        """Return what is left of the owner's ceiling; None if there is no ceiling."""
        return self._left(self.epsilon())

    def _left(self, spent: float) -> float | None:
        ceiling = self.policy.max_epsilon
        return None if ceiling is None else max(0.0, ceiling - spent)

    def back_up(self, target: Path) -> None:
        """Write a copy of the ledger as it is at one moment, also while the node is running.

        Parameters
        ----------
        target : Path
            Must not exist; only its owner can read it.

        Raises
        ------
        InputError
            If the ledger is damaged, or the file exists or cannot be written.
        """
        self._check()
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "exists already")
            os.close(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            with self._open() as ledger, closing(sqlite3.connect(partial)) as copy:
                ledger.backup(copy)
            os.replace(partial, target)
        except (OSError, sqlite3.Error) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise InputError(
                "FILE", str(target), f"cannot hold a copy of the ledger ({why}); name a new file"
            ) from None
        finally:
            partial.unlink(missing_ok=True)

    def check_budget(
        self, federation: str, plan: PrivacyPlan | None, steps: int, also: Sequence[tuple[float, float, int]] = ()
    ) -> None:
        """Refuse steps that would exceed the owner's ceiling over all runs, or the run's own.

        ``also`` are steps of another kind (noise multiplier, sample rate, number) that come with them.

        Raises
        ------
        BudgetError
            With the epsilon that is left.
        InputError
            If earlier steps protect another unit than these, so that the epsilon of both together is unknown.
        """
        self.check_unit()
        ceiling, left = self.policy.max_epsilon, self.left()
        if ceiling is not None:
            after = self._epsilon([*self.history(), *also, _charged(plan, steps)])
            if after > ceiling:
                raise BudgetError(
                    f"{steps} more steps would bring epsilon over all runs to {after:.4g}, above the owner's ceiling "
                    f"of {ceiling:.4g}, of which {left:.4g} is left",
                    left,
                )
        if plan is not None:
            Ledger(plan.accountant, plan.delta, [*self.history(federation), *also]).check(plan, steps)

    def check_unit(self) -> None:
        """Refuse to count steps that protect different units.

        Raises
        ------
        InputError
            If earlier steps protect another unit than the owner's, so that the epsilon of all together is unknown.
        """
        with self._transaction() as database:
            units = {
                unit for (unit,) in database.execute("SELECT DISTINCT unit FROM charges WHERE noise_multiplier > 0")
            }
        if units - {self.unit}:
            before = " and ".join(sorted(unit or "single examples" for unit in units - {self.unit}))
            remedy = f"is not what earlier steps in {self.path} protect ({before}), so that their epsilon together is"
            remedy = f"{remedy} unknown; put it back, or begin another ledger in another state.directory"
            raise InputError("data.unit", self.unit or None, remedy)

    def of_federation(self, federation: str, plan: PrivacyPlan) -> Ledger:
        """Return the ledger of one federation, by the run's own accountant and delta."""
        return Ledger(plan.accountant, plan.delta, self.history(federation))

    @contextmanager
    def round(
        self,
        federation: str,
        run: str,
        server_round: int,
        plan: PrivacyPlan | None,
        steps: int,
        also: Sequence[tuple[float, float, int]] = (),
    ) -> Iterator[Charge]:
        """Admit a round of training, and hold the ledger for it.

        Parameters
        ----------
        federation, run : str
        server_round : int
        plan : PrivacyPlan, optional
            None without privacy.
        steps : int
            Training steps of the round.
        also : sequence of (float, float, int), optional
            Noise multiplier, sample rate and number of steps of another kind.

        Yields
        ------
        Charge
            Call its :meth:`Charge.step` before every training step, and :meth:`Charge.take` before every other one.

        Raises
        ------
        StaleError, BudgetError
            Before anything is charged.
        """
        with self._lock:
            self._check()
            self.label_names(federation, run)
            self.check_round(run, server_round)
            self.check_budget(federation, plan, steps, also)
            with self._open() as database:
                admitted = [_charged(plan, steps), *also]
                yield Charge(database, federation, run, server_round, admitted, self.unit)

    def _epsilon(self, history: Sequence[Steps]) -> float:
        merged = sorted(_merged(history).items())
        taken = tuple(steps_of(sigma, rate, steps, group) for (sigma, rate, group), steps in merged if steps)
        return spent_epsilon(self.policy.accountant, self.policy.delta, taken)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._open() as database, _transaction(database):
            yield database

    @contextmanager
    def _open(self, path: Path | None = None) -> Iterator[sqlite3.Connection]:
        try:
            database = sqlite3.connect(path or self.path, timeout=60.0, isolation_level=None)
            try:
                # A transaction ends when it is on the disk, in this one file. A write-ahead log would be faster, but it
                # is a second file: whoever deletes it after a crash deletes charged steps.
                database.execute("PRAGMA journal_mode = DELETE")
                database.execute(f"PRAGMA synchronous = {_SYNCHRONOUS}")
                yield database
            finally:
                database.close()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            remedy = f"cannot be read or written ({error}); repair it or restore a copy: it is the owner's ledger"
            raise InputError("state.directory", str(self.path), remedy) from None


class Charge:
    """An admitted round of training, charged step by step.

    Parameters
    ----------
    database : sqlite3.Connection
    federation, run : str
    server_round : int
    admitted : sequence of tuple
        Steps as a ledger holds them; the training steps come first.
    unit : str
        The column of the persons that are protected; "" for single examples.

    Attributes
    ----------
    taken : int
        Training steps charged so far.
    """

    def __init__(
        self,
        database: sqlite3.Connection,
        federation: str,
        run: str,
        server_round: int,
        admitted: Sequence[Steps],
        unit: str = "",
    ) -> None:
        self.federation, self.run, self.server_round = federation, run, server_round
        self.taken = 0
        self._database = database
        self._unit = unit
        self._mechanism = _kind(admitted[0])
        self._left = _merged(admitted)
        self._rows: dict[Kind, int | None] = {}
        # Digest of the rows of earlier rounds, so that they need not be read again at every step.
        self._earlier = _sealing(database, "charges")

    def step(self) -> None:
        """Write a training step to disk; call this before the step reads an example.

        Raises
        ------
        GuardError
            If it is one more than were admitted.
        """
        self.take(*self._mechanism)
        self.taken += 1

    def take(self, noise_multiplier: float, sample_rate: float, group: int = 1) -> None:
        """Write a step of any admitted kind to disk; call this before the step reads an example.

        Raises
        ------
        GuardError
            If it is one more than were admitted.
        """
        kind = noise_multiplier, sample_rate, group
        if not self._left.get(kind):
            raise GuardError(f"a step beyond those that were admitted, with noise multiplier {noise_multiplier:.4g}")
        with _transaction(self._database) as database:
            if not self._rows:
                _check_round(database, self.run, self.server_round)
                database.execute("UPDATE runs SET last_round = ? WHERE run = ?", (self.server_round, self.run))
                _seal(database, "runs", _sealing(database, "runs"))
            row = self._rows.get(kind)
            if row is None:
                row = database.execute(
                    "INSERT INTO charges "
                    "(run, federation, round, noise_multiplier, sample_rate, group_size, unit, steps) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, 1)",
                    (self.run, self.federation, self.server_round, *kind, self._unit),
                ).lastrowid
            else:
                database.execute("UPDATE charges SET steps = steps + 1 WHERE number = ?", (row,))
            first = min(number for number in (row, *self._rows.values()) if number is not None)
            _seal(database, "charges", _sealing(database, "charges", first, self._earlier.copy()))
        self._rows[kind] = row
        self._left[kind] -= 1

    def check_taken(self, steps: int) -> None:
        """Refuse a result whose number of steps differs from what was charged.

        Raises
        ------
        GuardError
        """
        if steps != self.taken:
            raise GuardError(f"the training took {steps} steps, and {self.taken} were charged")


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield database
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _columns(database: sqlite3.Connection, of: str) -> set[str]:
    return {name for _, name, *_ in database.execute(f"PRAGMA table_info({of})")}


def _sealing(
    database: sqlite3.Connection, of: str, first: int = 0, after: Any = None, sealed: dict[str, str] = _SEALED
) -> Any:
    """Return the hash of a table's rows from number ``first`` on, chained to the hash of the rows before."""
    sha = hashlib.sha256() if after is None else after
    for row in database.execute(sealed[of], (first,)):
        sha.update(repr(row).encode())
    return sha


def _seal(database: sqlite3.Connection, of: str, sha: Any) -> None:
    database.execute("INSERT OR REPLACE INTO seals VALUES (?, ?)", (of, sha.hexdigest()))


def _charged(plan: PrivacyPlan | None, steps: int) -> Steps:
    return (0.0, 1.0, steps) if plan is None else plan.charged(steps)


def _kind(entry: Steps) -> Kind:
    return entry[0], entry[1], group_of(entry)


def _merged(history: Sequence[Steps]) -> dict[Kind, int]:
    """Add up the steps of each kind."""
    merged: dict[Kind, int] = {}
    for entry in history:
        merged[_kind(entry)] = merged.get(_kind(entry), 0) + entry[2]
    return merged


def _check_newest(database: sqlite3.Connection, federation: str, run: str) -> None:
    newest = database.execute(
        "SELECT run FROM runs WHERE federation = ? ORDER BY number DESC LIMIT 1", (federation,)
    ).fetchone()
    if newest is None or newest[0] != run:
        raise StaleError("the message is of a run that was not described here, or of one that ended")


def _check_config(database: sqlite3.Connection, run: str, config: str) -> None:
    found = database.execute("SELECT config FROM runs WHERE run = ?", (run,)).fetchone()
    if found is None or found[0] != config:
        raise StaleError("the message comes with another config than its run was described with")


def _check_round(database: sqlite3.Connection, run: str, server_round: int) -> None:
    found = database.execute("SELECT last_round FROM runs WHERE run = ?", (run,)).fetchone()
    if found is None or server_round <= found[0]:
        raise StaleError(f"round {server_round} was begun here already, or is over")
