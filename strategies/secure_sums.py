"""The server's half of a secure sum (:mod:`fedlora.communication.secure_sums`): it learns the sum, and no summand."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from fedlora.arrays import Arrays
from fedlora.communication import masks
from fedlora.communication.secure_sums import (
    FEWEST,
    KEYS,
    MASKED,
    SECURE,
    SECURE_BYTES,
    SHARES,
    SUM,
    UNMASK,
    FixedPoint,
    Thresholds,
    joined,
    neighbourhoods,
    planned_bytes,
    raw_record,
    read_raw,
)
from fedlora.config import Config
from fedlora.errors import ClientErrorCode, InputError, plain_text
from fedlora.privacy.discrete_gaussian import NoisySum
from fedlora.privacy.mechanisms import Mechanism, mechanism_of
from fedlora.server.sampling import get_sampling
from fedlora.strategies.client_noise import ClientNoise
from fedlora.strategies.replies import (
    LONGEST_REASON,
    NO_REPLY,
    ReplyError,
    first_replies,
    only_reply_errors,
    read_reply,
)
from fedlora.strategies.updates import OnlyCombined, Shapes, Update

log = logging.getLogger("fedlora")

Send = Callable[[list[Message]], Iterable[Message]]
Fail = Callable[[int, int, str], None]
_T = TypeVar("_T")
_Read = Callable[[int, RecordDict], _T]


class SecureSums:
    """Runs the exchanges of a secure sum around a round's own.

    Parameters
    ----------
    config : Config

    Attributes
    ----------
    active : bool
        Whether the run has secure sums (``server.secure_aggregation``).
    send : callable (list of Message) -> iterable of Message
        Sends queries of the round under way; the loop sets it.
    stage : str
        The exchange under way.
    failure : str
        Why the round has no sum; "" where it has, or may still have one.
    waited : float
        Seconds that unmasking waited for its replies.
    noise : NoisySum or None
        How the round's clients clip and noise their updates, which then count alike; None where they do not.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.active = config, config.server.secure_aggregation
        self.send: Send = _unset
        self.stage, self.failure, self.waited = SUM, "", 0.0
        self.noise: NoisySum | None = None
        self._begin(0, "", {})

    def _begin(self, asked: int, group: str, nodes: Mapping[int, int]) -> None:
        self.stage, self.failure, self.waited = SUM, "", 0.0
        self._asked, self._group, self._nodes = asked, group, dict(nodes)
        self._thresholds = Thresholds.of(self.config.server, asked)
        self._keys: dict[int, bytes] = {}
        self._neighbours: dict[int, list[int]] = {}
        self._sealed: dict[int, dict[int, bytes]] = {}  # by source and holder
        self._shares: dict[int, float] = {}

    def prepare(self, clients: int) -> None:
        """Refuse a run whose rounds ask too few clients.

        Raises
        ------
        InputError
        """
        server = self.config.server
        most = get_sampling(server.sampling).most(clients, server.fraction_train)
        if self.active and most < max(FEWEST, server.min_replies):
            remedy = f"needs {max(FEWEST, server.min_replies)} clients in a round, and {most} are asked"
            raise InputError("server.secure_aggregation", True, f"{remedy}; raise fraction_train, or leave it out")

    def allows(self, clients: int) -> bool:
        """Whether a round that asks so many clients sends them anything."""
        return not self.active or clients >= Thresholds.of(self.config.server, clients).clients

    def share_keys(
        self, weights: Mapping[int, float], nodes: Mapping[int, int], group: str, size: int, fail: Fail
    ) -> list[int]:
        """Let a round's clients exchange keys and shares of their secrets.

        Parameters
        ----------
        weights : mapping of int to float
            Of the clients that the round asks.
        nodes : mapping of int to int
            Client to node.
        group : str
            The messages' group, which is their round.
        size : int
            Numbers of an update.
        fail : callable (client, code, error)
            Is told of each client that drops out.

        Returns
        -------
        list of int
            The clients that are left; none where they are too few, as :attr:`failure` says.

        Raises
        ------
        InputError
            If the updates and their noise do not fit into the sum.
        """
        self._begin(len(weights), group, {client: nodes[client] for client in weights})
        if not self._enough(weights, "are asked"):
            return []
        promised = self._thresholds.clients
        self.noise = mechanism_of(self.config).noisy_sum(self.config, size, len(weights), promised)
        asked = {client: RecordDict({SECURE: ConfigRecord({"stage": KEYS, "client": client})}) for client in weights}
        self._keys = self._query(KEYS, asked, _read_keys, fail)
        ring = list(self._keys)
        np.random.default_rng([self.config.run.seed, *map(int, group.split("/")), 0x5E]).shuffle(ring)
        if not self._enough(ring, "gave keys"):
            return []
        self._neighbours = neighbourhoods(ring, self._thresholds.shares)
        asked = {client: self._neighbours_keys(client) for client in self._keys}
        self._sealed = self._query(SHARES, asked, self._read_sealed, fail)
        held = {client: len(self._sources(client)) + 1 for client in self._sealed}
        if min(held.values(), default=0) < self._thresholds.needed or not self._enough(self._sealed, "gave shares"):
            self.failure = self.failure or "too few clients hold the shares of one"
            return []
        left = list(self._sealed)
        total = math.fsum(weights[client] for client in left) or 1.0
        self._shares = {client: weights[client] / total if self.noise is None else 1.0 for client in left}
        return left

    def content(self, client: int) -> dict[str, ConfigRecord | Any]:
        """Return what the round's message takes to a client beside its arrays."""
        if not self.active:
            return {}
        sources = self._sources(client)
        sealed = joined([self._sealed[source][client] for source in sources], masks.SEALED)
        about = {"asked": self._asked, "promised": self._thresholds.clients, "share": self._shares[client]}
        return {SECURE: ConfigRecord({**about, "clients": sources}), SECURE_BYTES: raw_record(SHARES, sealed)}

    def unmask(self, total: np.ndarray, answered: list[int]) -> np.ndarray | None:
        """Take the masks off a sum.

        Parameters
        ----------
        total : ndarray of uint32 [n]
            Of the masked residues of those that answered.
        answered : list of int

        Returns
        -------
        ndarray of float64 [n] or None
            The weighted mean of the numbers of those that answered; None where it cannot be had, as :attr:`failure`
            says.
        """
        if self.failure or not self._enough(answered, "answered"):
            return None
        there = set(answered)
        shares = self._collect(there)
        try:
            for client in self._sealed:
                total = total - self._mask_in_sum(client, shares[client], there, len(total))
        except ValueError as error:
            self.failure = f"the masks cannot be taken off: {error}"
            return None
        weight = math.fsum(self._shares[client] for client in answered)
        if not weight:
            self.failure = "no client that answered holds examples"
            return None
        if self.noise is not None:
            return FixedPoint(self.noise.scale).decode(total) / weight
        return FixedPoint.weighted(self.config.server.clipping_range, self._asked).decode(total) / weight

    def payload_bytes(self, client: int, direction: str) -> int:
        """Return the formula of a message's keys and shares, in the exchange under way."""
        if not self.active or direction not in ("down", "up"):
            return 0
        held, sources = len(self._neighbours.get(client, ())), len(self._sources(client))
        down = {KEYS: 0, SHARES: held * 2 * masks.PUBLIC_KEY, SUM: sources * masks.SEALED, UNMASK: 0}
        up = {
            KEYS: 2 * masks.PUBLIC_KEY,
            SHARES: (held - 1) * masks.SEALED,
            SUM: 0,
            UNMASK: (sources + 1) * masks.SHARE,
        }
        return (down if direction == "down" else up)[self.stage]

    def planned_bytes(self, clients: int) -> tuple[int, int]:
        """Return the bytes of keys and shares, down and up, of a round that asks so many clients who all answer."""
        return planned_bytes(self.config.server, clients) if self.active else (0, 0)

    def _collect(self, there: set[int]) -> dict[int, list[bytes]]:
        """Ask for the shares of the seeds of those that answered, and of the private keys of the others."""
        started = time.perf_counter()
        named: dict[int, list[int]] = {}
        asked = {}
        for client in sorted(there):
            held = [client, *self._sources(client)]
            active, dropped = [c for c in held if c in there], [c for c in held if c not in there]
            named[client] = [*active, *dropped]
            asked[client] = RecordDict({SECURE: ConfigRecord({"stage": UNMASK, "active": active, "dropped": dropped})})

        def read(client: int, content: RecordDict) -> list[bytes]:
            return _rows(content, SHARES, len(named[client]), masks.SHARE)

        shares: dict[int, list[bytes]] = {client: [] for client in self._sealed}
        for client, found in self._query(UNMASK, asked, read, _note).items():
            for of, share in zip(named[client], found, strict=True):
                shares[of].append(share)
        self.waited = time.perf_counter() - started
        return shares

    def _query(self, stage: str, asked: Mapping[int, RecordDict], read: _Read[_T], fail: Fail) -> dict[int, _T]:
        """Send an exchange of its own, and read the replies, in the order of the clients."""
        self.stage = stage
        clients = {self._nodes[client]: client for client in asked}
        kind, found, gone = f"{MessageType.QUERY}.{SECURE}", {}, set()
        messages = [Message(content, self._nodes[c], kind, group_id=self._group) for c, content in asked.items()]
        for reply in first_replies(self.send(messages), clients, self._group, log.warning):
            client = clients[reply.metadata.src_node_id]
            try:
                if not reply.has_error():
                    found[client] = only_reply_errors(read)(client, reply.content)
                    continue
                fail(client, reply.error.code, reply.error.reason or "")
            except ReplyError as error:
                fail(client, ClientErrorCode.REPLY, f"the reply is refused: {error}")
            gone.add(client)
        for client in asked:
            if client not in found and client not in gone:
                fail(client, NO_REPLY, f"no reply to the exchange of {stage} within the timeout")
        self.stage = SUM
        return {client: found[client] for client in sorted(found)}

    def _mask_in_sum(self, client: int, shares: list[bytes], there: set[int], count: int) -> np.ndarray:
        """Return what a client put into the sum: its own mask, or where it dropped out those of others for it.

        Raises
        ------
        ValueError
            If too few of its shares came, or they do not fit.
        """
        if len(shares) < self._thresholds.needed:
            raise ValueError(f"{len(shares)} shares of a secret of client {client} came back")
        secret = masks.join(shares[: self._thresholds.needed])
        if client in there:
            return masks.mask(secret, count)
        if masks.public_key(secret) != self._keys[client][: masks.PUBLIC_KEY]:
            raise ValueError(f"the shares of client {client} give another key than it had")
        found = np.zeros(count, np.uint32)
        for other in self._sources(client):
            if other in there:
                key = masks.agree(secret, self._keys[other][: masks.PUBLIC_KEY])
                found = found + masks.pair_mask(key, other, client, count)
        return found

    def _enough(self, clients: Any, did: str) -> bool:
        if len(clients) < self._thresholds.clients:
            self.failure = f"a secure sum needs {self._thresholds.clients} clients, and {len(clients)} {did}"
        return not self.failure

    def _sources(self, client: int) -> list[int]:
        """Return those of a client's neighbours that gave it shares."""
        return [source for source in self._neighbours.get(client, ()) if source != client and source in self._sealed]

    def _neighbours_keys(self, client: int) -> RecordDict:
        held = self._neighbours[client]
        about = ConfigRecord({"stage": SHARES, "clients": held, "needed": self._thresholds.needed})
        keys = joined([self._keys[neighbour] for neighbour in held], 2 * masks.PUBLIC_KEY)
        return RecordDict({SECURE: about, SECURE_BYTES: raw_record(KEYS, keys)})

    def _read_sealed(self, client: int, content: RecordDict) -> dict[int, bytes]:
        holders = [holder for holder in self._neighbours[client] if holder != client]
        return dict(zip(holders, _rows(content, SHARES, len(holders), masks.SEALED), strict=True))


class SecureUpdates(OnlyCombined):
    """The updates of a round of which the server learns the weighted mean alone.

    Parameters
    ----------
    stream : iterator of Update
        Of masked residues, in the order of ``shapes``.
    start : Tensor [n]
    shapes : mapping of str to tuple of int
    sums : SecureSums
    noise : ClientNoise
        Keeps count of noisy sums.
    """

    def __init__(
        self, stream: Iterator[Update], start: torch.Tensor, shapes: Shapes, sums: SecureSums, noise: ClientNoise
    ) -> None:
        super().__init__(stream, start, shapes, "which server.secure_aggregation hides")
        self._sums, self._noise = sums, noise

    def mean(self) -> Arrays | None:
        """Return the start plus the weighted mean of the moves; None where the sum cannot be had."""
        total, answered = np.zeros(len(self._from), np.uint32), []
        for update in self._stream:
            total = total + update.vector.numpy().view(np.uint32)
            answered.append(update.client)
        move = self._sums.unmask(total, answered)
        self.missing = self._sums.failure
        if move is None:
            return None
        if self._sums.noise is not None:
            self._noise.released(self._sums.noise, len(answered))
        return self.moved(torch.from_numpy(move))


def _read_keys(client: int, content: RecordDict) -> bytes:
    (keys,) = _rows(content, KEYS, 1, 2 * masks.PUBLIC_KEY)
    masks.read_public_key(keys[: masks.PUBLIC_KEY])
    masks.read_public_key(keys[masks.PUBLIC_KEY :])
    return keys


def _rows(content: RecordDict, name: str, count: int, length: int) -> list[bytes]:
    rows = read_raw(content, SECURE_BYTES, name, (count, length), np.uint8)
    return [row.tobytes() for row in rows]


@only_reply_errors
def read_masked(message: Message, numbers: int, mechanism: Mechanism) -> tuple[torch.Tensor, MetricRecord]:
    """Read masked residues and metrics from a reply.

    Returns
    -------
    (Tensor of int32 [n], MetricRecord)

    Raises
    ------
    ReplyError
    """
    _, metrics = read_reply(message, mechanism=mechanism)
    residues = read_raw(message.content, "arrays", MASKED, (numbers,), np.uint32)
    return torch.from_numpy(residues.view(np.int32).copy()), metrics


def _note(client: int, code: int, error: str) -> None:
    log.warning("client %d gave no shares of others' secrets: %s", client, plain_text(error, LONGEST_REASON))


def _unset(messages: list[Message]) -> Iterable[Message]:
    raise RuntimeError("SecureSums.send is not set")
