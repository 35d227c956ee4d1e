"""What clients keep between rounds: parts, each with a version. A client gets what it lacks, and nothing else.

A part is a set of arrays that clients hold together. There are two sorts. A *whole* part is replaced by its next
version, which is named by the digest of its arrays. A *chain* is a sum: every version adds an increment to the one
before, so that a client that missed rounds gets the increments since its own version, or the sum where that is smaller.

Both halves use this file: the server keeps a :class:`Parts`, a client the part's last version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedlora.arrays import Arrays, leading
from fedlora.communication.wire import digest

INITIAL = "initial"
"""Part of the frozen arrays; and the direction of bytes of what was made before the first round."""

_ROUND = "@"


@dataclass(frozen=True)
class Piece:
    """What a client needs to reach a part's current version.

    Attributes
    ----------
    arrays : dict of str to Tensor
        Of a chain, increments are named ``NAME@ROUND``.
    after : str
        The version that the increments are added to; "" where the arrays are all there is to the part.
    made : int
        The round that made the arrays; 0 for a start.
    """

    arrays: Arrays
    after: str = ""
    made: int = 0

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return sum(array.numel() for array in self.arrays.values())


def residual_sum(total: Mapping[str, torch.Tensor], increment: Mapping[str, torch.Tensor]) -> Arrays:
    """Add one increment to a sum of residuals.

    Parameters
    ----------
    total : mapping of str to Tensor [m, n]
        By module path; empty for zero.
    increment : mapping of str to Tensor
        ``PATH.residual`` [m, n], or factors ``PATH.residual_B`` [m, k] and ``PATH.residual_A`` [k, n].

    Returns
    -------
    dict of str to Tensor [m, n]
        Both halves compute it by the same operations, so that it has the same bits on both.
    """
    found = dict(total)
    for path in sorted({name.rpartition(".")[0] for name in increment}):
        if f"{path}.residual" in increment:
            added = increment[f"{path}.residual"]
        else:
            added = increment[f"{path}.residual_B"] @ increment[f"{path}.residual_A"]
        found[path] = found[path] + added if path in found else added.clone()
    return found


@dataclass
class Chain:
    """A sum of residuals with its last increments.

    Attributes
    ----------
    key : str
        Names the chain; it cannot be guessed outside of the run.
    total : dict of str to Tensor [m, n]
        The current sum, by module path.
    base : dict of str to Tensor [m, n]
        The sum before the increments that are kept.
    versions : list of str
        Of the base, then after each increment.
    increments : list of (int, dict)
        Each with the round that made it. The oldest are dropped while they all have more numbers than the sum.
    """

    key: str
    total: Arrays = field(default_factory=dict)
    base: Arrays = field(default_factory=dict)
    versions: list[str] = field(default_factory=lambda: [""])
    increments: list[tuple[int, Arrays]] = field(default_factory=list)

    @property
    def version(self) -> str:
        """The current version."""
        return self.versions[-1]

    def add(self, made: int, increment: Arrays) -> None:
        """Add an increment; a round makes one at most, since it names them.

        Raises
        ------
        ValueError
            If the round made one before.
        """
        if self.increments and self.increments[-1][0] == made:
            raise ValueError(f"round {made} made an increment already")
        self.total = residual_sum(self.total, increment)
        named = f"{self.key} {self.version} {made} {digest(increment)}"
        self.versions.append(hashlib.sha256(named.encode()).hexdigest())
        self.increments.append((made, increment))
        whole = _numbers(self.total)
        while len(self.increments) > 1 and sum(_numbers(arrays) for _, arrays in self.increments) > whole:
            self.base = residual_sum(self.base, self.increments.pop(0)[1])
            self.versions.pop(0)

    def copy(self) -> Chain:
        """Return a chain that stays as it is while this one grows; they share their tensors, which never change."""
        return replace(self, versions=[*self.versions], increments=[*self.increments])

    def since(self, version: str) -> Piece:
        """Return what leads from a version to the current one: increments, or the sum where these are more numbers."""
        made = self.increments[-1][0]
        if version in self.versions:
            place = self.versions.index(version)
            missing = self.increments[place:]
            if sum(_numbers(arrays) for _, arrays in missing) <= _numbers(self.total):
                named = {f"{name}{_ROUND}{r}": array for r, arrays in missing for name, array in arrays.items()}
                return Piece(named, version or self.key, made)
        return Piece({f"{path}.residual": array for path, array in self.total.items()}, "", made)

    def knows(self, version: str) -> bool:
        """Whether increments can be added to that version here."""
        return (version == self.key and self.versions[0] == "") or version in self.versions

    def follow(self, arrays: Arrays, after: str, version: str) -> None:
        """Go to a version that a server announces, by what it sent; the opposite of :meth:`since`.

        Raises
        ------
        ValueError
            If the increments do not lead to that version.
        """
        if not after:
            total = {name.rpartition(".")[0]: array for name, array in arrays.items()}
            self.total, self.base, self.versions, self.increments = total, dict(total), [version], []
            return
        start = 0 if after == self.key else self.versions.index(after)
        rounds: dict[int, Arrays] = {}
        for full, array in arrays.items():
            name, _, text = full.rpartition(_ROUND)
            rounds.setdefault(int(text), {})[name] = array
        known = len(self.versions) - 1
        for place, made in enumerate(sorted(rounds), start):
            if place >= known:
                self.add(made, rounds[made])
        if self.version != version:
            raise ValueError("the increments that came do not lead to the version that the server announced")

    def to_arrays(self) -> tuple[Arrays, str]:
        """Return named arrays and a text from which :meth:`from_arrays` makes the chain again."""
        arrays = {f"total/{name}": array for name, array in self.total.items()}
        if self.increments:  # else the base is the sum
            shared = {name for name, array in self.base.items() if array is self.total.get(name)}  # no file takes these
            arrays |= {f"base/{n}": array.clone() if n in shared else array for n, array in self.base.items()}
        for made, increment in self.increments:
            arrays |= {f"{made}/{name}": array for name, array in increment.items()}
        made_in = [made for made, _ in self.increments]
        return arrays, json.dumps({"key": self.key, "versions": self.versions, "rounds": made_in})

    @classmethod
    def from_arrays(cls, arrays: Arrays, about: str) -> Chain:
        """Make a chain of what :meth:`to_arrays` returned."""
        facts: dict[str, Any] = json.loads(about)

        def under(prefix: str) -> Arrays:
            found = {n.removeprefix(f"{prefix}/"): a for n, a in arrays.items() if n.startswith(f"{prefix}/")}
            return dict(sorted(found.items()))

        increments = [(int(made), under(str(made))) for made in facts["rounds"]]
        total = under("total")
        base = under("base") if increments else dict(total)
        return cls(facts["key"], total, base, list(facts["versions"]), increments)


class Parts:
    """The parts of a run on its server, and which version each client holds.

    Parameters
    ----------
    key : str
        Names the run's chains.

    Attributes
    ----------
    whole : dict of str to (str, Piece)
        Version and arrays of every whole part.
    chains : dict of str to Chain
    held : dict of int to dict of str to str
        By client and part, the version that it got; clients share a dict, which is not changed.
    last : dict of int to int
        By client, the round in which it was sent something last.
    since : dict of int to int or None
        The same, before its current message.
    blocks : callable (client) -> (hashable, mapping of str to shape) or None
        The shapes of those arrays of which a client holds the leading block alone, and a key that clients of the same
        shapes share; None for a client that holds all there is. A part of blocks has a version of its own.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.whole: dict[str, tuple[str, Piece]] = {}
        self.chains: dict[str, Chain] = {}
        self.held: dict[int, dict[str, str]] = {}
        self.last: dict[int, int] = {}
        self.since: dict[int, int | None] = {}
        self.blocks: Callable[[int], tuple[Hashable, Mapping[str, tuple[int, ...]]] | None] = lambda client: None
        self._cut: dict[tuple[str, Hashable], tuple[str, Piece]] = {}
        self._latest: dict[str, str] = {}

    def set(self, part: str, arrays: Arrays, made: int) -> None:
        """Set a whole part's current version; arrays that are those of the version before change nothing."""
        if not arrays:
            return
        version = digest(arrays)
        if part not in self.whole or self.whole[part][0] != version:
            before = self.whole[part][0] if part in self.whole else ""
            self._cut = {key: cut for key, cut in self._cut.items() if key[0] != before}
            self.whole[part] = version, Piece(dict(arrays), "", made)

    def add(self, part: str, increment: Arrays, made: int) -> None:
        """Add an increment to a chain."""
        self.chains.setdefault(part, Chain(hashlib.sha256(f"{self.key} {part}".encode()).hexdigest()))
        self.chains[part].add(made, increment)

    def versions(self, wanted: Iterable[str], client: int | None = None) -> dict[str, str]:
        """Return the current versions of parts, as a client holds them; those that have no arrays are left out."""
        found = {}
        for part in wanted:
            if part in self.whole:
                found[part] = self._held_whole(part, client)[0]
            elif part in self.chains:
                found[part] = self.chains[part].version
        return found

    def missing(self, client: int, wanted: Iterable[str]) -> dict[str, Piece]:
        """Return what a client lacks of these parts."""
        held = self.held.get(client, {})
        found = {}
        for part, version in self.versions(wanted, client).items():
            if held.get(part) != version:
                chain = self.chains.get(part)
                found[part] = self._held_whole(part, client)[1] if chain is None else chain.since(held.get(part, ""))
        return found

    def _held_whole(self, part: str, client: int | None) -> tuple[str, Piece]:
        """Return version and arrays of a whole part, as a client holds it."""
        version, piece = self.whole[part]
        own = None if client is None else self.blocks(client)
        if own is None or not any(name in own[1] for name in piece.arrays):
            return version, piece
        key, shapes = own
        if (version, key) not in self._cut:
            arrays = {n: leading(a, shapes[n]).contiguous() if n in shapes else a for n, a in piece.arrays.items()}
            self._cut[version, key] = digest(arrays), replace(piece, arrays=arrays)
        return self._cut[version, key]

    def sent(self, client: int, wanted: Iterable[str], server_round: int) -> None:
        """Note that a client has the current versions."""
        held = self.held.get(client, {}) | self.versions(wanted, client)
        # Most clients of a round hold the same: one dict serves them.
        self._latest = self._latest if held == self._latest else held
        self.held[client] = self._latest
        self.since[client] = self.last.get(client)
        self.last[client] = server_round

    def forget(self, client: int) -> None:
        """Note that a client has nothing."""
        self.held.pop(client, None)
        self.last.pop(client, None)

    def state_dict(self) -> dict[str, Any]:
        """Return which client has what, as JSON; clients that have the same are in lists, which are quick to write."""
        same: dict[int, list[int]] = {}  # clients, by the id of the dict that they share
        for client, held in self.held.items():
            same.setdefault(id(held), []).append(client)
        groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for clients in same.values():
            groups.setdefault(tuple(sorted(self.held[clients[0]].items())), []).extend(clients)
        pairs = sorted({pair for group in groups for pair in group})
        place = {pair: i for i, pair in enumerate(pairs)}
        holders = [
            {"pairs": [place[pair] for pair in group], "clients": clients, "last": [self.last[c] for c in clients]}
            for group, clients in groups.items()
        ]
        made = {part: piece.made for part, (_, piece) in self.whole.items()}
        return {"pairs": pairs, "holders": holders, "made": made}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, but for the arrays."""
        pairs = [tuple(pair) for pair in state["pairs"]]
        self.held, self.last = {}, {}
        for group in state["holders"]:
            held = dict(pairs[i] for i in group["pairs"])
            for client, last in zip(group["clients"], group["last"], strict=True):
                self.held[client], self.last[client] = held, last


def _numbers(arrays: Mapping[str, torch.Tensor]) -> int:
    return sum(array.numel() for array in arrays.values())
