"""The parts that this host holds for its clients, on the disk and in memory; see :mod:`fedlora.communication.parts`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Message
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from fedlora.adapters import AdaptedModel
from fedlora.alignment import aligned
from fedlora.arrays import Arrays
from fedlora.assets import cache_dir
from fedlora.clients.participant import Participant, write_whole
from fedlora.communication.broadcast import AFTER, HELD, KEY, record_key
from fedlora.communication.parts import Chain
from fedlora.communication.wire import decode, digest
from fedlora.errors import NeedsInitialError
from fedlora.roles import FROZEN, Roles, roles_of

_CHAIN = "chain"


def receive(client: Participant, message: Message, roles: Roles, adapted: AdaptedModel) -> Arrays:
    """Put the parts that a round needs into the model, and return the arrays of those that are no residual.

    What came with the message is kept on this host once the model took it.

    Raises
    ------
    NeedsInitialError
        If this host does not hold a part, or not the version that increments are added to.
    RuntimeError
        If arrays that came are not those that the server announced.
    """
    about: Mapping[str, Any] = message.content.get(HELD) or {}
    versions = {str(part): str(version) for part, version in about.items() if "/" not in part}
    found: Arrays = {}
    residual = ""
    for part, version in versions.items():
        came = _came(message, part)
        if roles.get(part, FROZEN).increment:
            after, key = str(about.get(AFTER + part, "")), str(about.get(KEY + part, ""))
            chain = _chain(client, key, version, after, came)
            residual = version
            if adapted.versions.get(part) != version:
                adapted.set_residual(chain.total)
                adapted.versions[part] = version
        else:
            found |= _whole(client, part, version, came, adapted)
    if not residual and adapted.residual:
        adapted.set_residual({})
    for part in [part for part in adapted.versions if part not in versions]:
        del adapted.versions[part]
    return found


def divide(
    client: Participant, came: Arrays, parts: Arrays, roles: Roles, adapted: AdaptedModel
) -> tuple[Arrays, Arrays]:
    """Divide the global arrays that a client has into the frozen ones and those that it trains.

    Parameters
    ----------
    client : Participant
    came : dict of str to Tensor
        Of the message itself.
    parts : dict of str to Tensor
        Of the parts, which are in the model already.
    roles : mapping of str to Role
    adapted : AdaptedModel

    Returns
    -------
    (dict of str to Tensor, dict of str to Tensor)
        Frozen arrays that came; what training starts from, with the client's own where these stay with it. Such arrays
        start at 0 where the server makes no start of them.
    """
    of = roles_of(parts | came, roles, adapted.head_names)
    frozen = {name: array for name, array in came.items() if not of[name].trained and name not in parts}
    start = {name: array for name, array in (parts | came).items() if of[name].trained}
    home = adapted.names(kind for kind, role in roles.items() if role.home)
    if home:
        parameters = {name: adapted.parameter(name) for name in home if name not in start}
        start |= {name: torch.zeros(p.shape[1:], dtype=p.dtype) for name, p in parameters.items()}
        start |= {name: array for name, array in client.own().items() if name in home}
    return frozen, start


def _came(message: Message, part: str) -> Arrays | None:
    for key in (record_key(part, 0), record_key(part, 1)):
        record = message.content.get(key)
        if isinstance(record, ArrayRecord):
            return decode(record)
    return None


def _whole(client: Participant, part: str, version: str, came: Arrays | None, adapted: AdaptedModel) -> Arrays:
    arrays = part_arrays(version) if came is None else came
    if arrays is None:
        part_arrays.cache_clear()
        raise NeedsInitialError
    if came is not None and digest(arrays) != version:
        raise RuntimeError("the frozen arrays that came differ from the digest that the server announced")
    if adapted.versions.get(part) != version:
        adapted.versions.pop(part, None)
        adapted.set_shared(arrays)
        adapted.versions[part] = version
    path = part_path(version)
    if came is None:
        client.make_room(0, path)
    elif part_arrays(version) is None:
        client.make_room(sum(array.nbytes for array in arrays.values()))
        write_whole(path, save(arrays))
        part_arrays.cache_clear()
    return arrays


@lru_cache(maxsize=8)
def part_arrays(version: str) -> Arrays | None:
    """Return the arrays of a digest, or None where this host does not hold them (whole)."""
    path = part_path(version)
    try:
        arrays: Arrays = {name: aligned(array) for name, array in load(path.read_bytes()).items()}
    except (OSError, SafetensorError):  # not there, or cut short: a host may lose its power
        return None
    return arrays if digest(arrays) == version else None


_chains: dict[str, Chain] = {}


def _chain(client: Participant, key: str, version: str, after: str, came: Arrays | None) -> Chain:
    """Return the chain of a key at a version."""
    path = part_path(key, _CHAIN)
    chain = _chains.get(key)
    if chain is None or (chain.version != version and not chain.knows(after)):
        # Another process of this host may have gone on with it.
        chain = _read_chain(path) or Chain(key)
    if chain.version != version:
        if after == key and not chain.knows(key):
            chain = Chain(key)  # all increments came: they need nothing that was here
        if came is None or (after and not chain.knows(after)):
            raise NeedsInitialError
        _chains.clear()
        try:
            chain.follow(came, after, version)
        except ValueError:
            # The server went back to an older copy of its run, and made other increments since: it has the sum.
            path.unlink(missing_ok=True)
            raise NeedsInitialError from None
        arrays, facts = chain.to_arrays()
        client.make_room(sum(array.nbytes for array in arrays.values()))
        write_whole(path, save(arrays, {"chain": facts}))
    else:
        client.make_room(0, path)
    _chains.clear()  # one run at a time: sums are as large as the layers that they are added to
    _chains[key] = chain
    return chain


def _read_chain(path: Path) -> Chain | None:
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata()["chain"]
            arrays = {name: aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # not there, or cut short
        return None
    return Chain.from_arrays(arrays, facts)


def part_path(version: str, sort: str = "") -> Path:
    """Return where a part is kept.

    Raises
    ------
    ValueError
        If the version is no digest: a server may not choose a path.
    """
    if not re.fullmatch("[0-9a-f]{64}", version):
        raise ValueError("the name of the frozen arrays is no SHA-256")
    return cache_dir() / "initial" / f"{version}{'.' + sort if sort else ''}.safetensors"
