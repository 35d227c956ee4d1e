"""What both halves of a secure sum share: the numbers on the wire, who shares with whom, and how many bytes that takes.

The protocol is SecAgg+ (Bonawitz et al., CCS 2017; Bell et al., CCS 2020, ePrint 2020/704), for a server and clients
that follow it but remember all they see. A server that lies about keys or about who dropped out is not held off. A
round has four exchanges, of which the third is the round's own:

1. ``keys``: each client draws two pairs of keys, one for masks and one for sealing, and sends the public ones.
2. ``shares``: each client gets its neighbours' keys, draws a seed, and sends each neighbour a sealed share of the seed
   and one of its private key for masks.
3. The round's message takes the sealed shares to their holders. The reply holds the client's numbers as residues
   modulo 2^32, plus the mask of its seed, plus or minus a mask for each neighbour.
4. ``unmask``: the server names who answered and who dropped out. Each client sends its shares of the former's seeds
   and of the latter's private keys, never both of one client. The server then takes all masks off the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord

from fedlora.communication.masks import PUBLIC_KEY, SEALED, SHARE
from fedlora.config import ServerSection

SECURE = "secure"
"""Key of what a message says of a secure sum, of a client's state between its exchanges, and the queries' action."""
SECURE_BYTES = "secure-bytes"
"""Key of the keys and shares in a message."""
KEYS, SHARES, SUM, UNMASK = "keys", "shares", "sum", "unmask"
"""The exchanges of a secure sum."""
MASKED = "masked"
"""Name of a reply's residues."""
WORD = 4
"""Bytes of a residue."""
FEWEST = 2
"""Clients in a sum at least: the sum of one is that client's update."""

_HALF = 2**31
_STYPE = "fedlora.secure"


@dataclass(frozen=True)
class FixedPoint:
    """Numbers as residues modulo 2^32, so that sums are exact.

    Attributes
    ----------
    scale : float
        Residues of 1.
    """

    scale: float

    @classmethod
    def weighted(cls, clipping_range: float, clients: int) -> FixedPoint:
        """Return the finest one in which a weighted mean cannot overflow.

        Each client multiplies its numbers, at most ``clipping_range``, by its share of the weights, and the shares sum
        to 1 at most. Rounding adds less than 1 a client.
        """
        return cls((_HALF - 2 - clients) / clipping_range)

    def encode(self, numbers: np.ndarray) -> np.ndarray:
        """Round to the nearest residues."""
        return as_residues(np.rint(numbers * self.scale))

    def decode(self, residues: np.ndarray) -> np.ndarray:
        """Return the numbers, in float64, of residues that stand for less than 2^31 in absolute value."""
        return residues.view(np.int32).astype(np.float64) / self.scale


def as_residues(whole: np.ndarray) -> np.ndarray:
    """Return whole numbers below 2^63 modulo 2^32."""
    return whole.astype(np.int64).astype(np.uint32)


@dataclass(frozen=True)
class Thresholds:
    """How many clients a secure sum needs.

    Attributes
    ----------
    shares : int
        Into how many shares each secret is divided: one for each neighbour, and one for its owner.
    needed : int
        How many of them give the secret back.
    clients : int
        Fewest clients in the sum.
    """

    shares: int
    needed: int
    clients: int

    @classmethod
    def of(cls, server: ServerSection, asked: int) -> Thresholds:
        """Return those of a round that asks so many clients."""
        shares = min(asked, server.num_shares | 1)
        return cls(shares, _part(server, shares), max(_part(server, asked), server.min_replies))


def _part(server: ServerSection, count: int) -> int:
    # Without the last digits, so that 0.6 of 10 clients is 6.
    return max(FEWEST, math.ceil(round(server.reconstruction_threshold * count, 9)))


def neighbourhoods(clients: Sequence[int], shares: int) -> dict[int, list[int]]:
    """Say who holds shares of whom: in a ring, each client and as many of the next on either side.

    Parameters
    ----------
    clients : sequence of int
        In the order of the ring, which should be drawn anew in every round.
    shares : int
        How many hold a client's shares, itself included. Where there are no more clients all hold shares of all.

    Returns
    -------
    dict of int to list of int
        Sorted; j is among those of i where i is among those of j.
    """
    count, reach = len(clients), (shares - 1) // 2
    if count <= shares:
        return {client: sorted(clients) for client in clients}
    return {
        client: sorted(clients[(place + step) % count] for step in range(-reach, reach + 1))
        for place, client in enumerate(clients)
    }


def planned_bytes(server: ServerSection, clients: int) -> tuple[int, int]:
    """Return the bytes of keys and shares that a round sends down to, and takes up from, so many clients together."""
    if clients < FEWEST:
        return 0, 0
    held = Thresholds.of(server, clients).shares
    sealed = (held - 1) * SEALED
    return clients * (held * PUBLIC_KEY * 2 + sealed), clients * (PUBLIC_KEY * 2 + sealed + held * SHARE)


def raw_record(name: str, numbers: np.ndarray) -> ArrayRecord:
    """Put bytes or residues into a record, without a header."""
    return ArrayRecord({name: Array(str(numbers.dtype), numbers.shape, _STYPE, numbers.tobytes())})


def read_raw(content: Mapping[str, object], key: str, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Undo :func:`raw_record` for what somebody else sent.

    Raises
    ------
    ValueError
        If there is no such record, or it holds something else.
    """
    record = content.get(key)
    if not isinstance(record, ArrayRecord) or set(record) != {name}:
        raise ValueError(f"it has no record {key} of {name} alone")
    array = record[name]
    if (tuple(array.shape), array.dtype, array.stype) != (shape, np.dtype(dtype).name, _STYPE):
        raise ValueError(f"{name} is not of {np.dtype(dtype).name} and of shape {shape}")
    if len(array.data) != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"{name} has {len(array.data)} bytes, which are not those of its shape")
    return np.frombuffer(array.data, dtype).reshape(shape)


def joined(parts: Sequence[bytes], length: int) -> np.ndarray:
    """Return texts of equal length as rows of bytes [n, length]."""
    return np.frombuffer(b"".join(parts), np.uint8).reshape(-1, length)
