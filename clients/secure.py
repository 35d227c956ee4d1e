"""The client's half of a secure sum (:mod:`fedlora.communication.secure_sums`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedlora import entropy
from fedlora.arrays import Arrays
from fedlora.clients.participant import Participant, check_described
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
    as_residues,
    joined,
    raw_record,
    read_raw,
)
from fedlora.errors import GuardError, InputError, StaleError
from fedlora.privacy.mechanisms import mechanism_of

State = dict[str, Any]


def answer(message: Message, context: Context) -> Message:
    """Answer an exchange of a secure sum in which nothing of the client's examples is read.

    Raises
    ------
    StaleError
        If the run, the round or the exchange is not the one that is due.
    """
    config = check_described(message, context)
    if not config.server.secure_aggregation:
        raise StaleError("the run was not described with secure sums")
    asked: Any = message.content[SECURE]
    stage = str(asked["stage"])
    if stage not in _ANSWERS:
        raise StaleError(f"a secure sum has no exchange {stage!r}")
    reply, state = _ANSWERS[stage](asked, message.content, _due(message, context, stage))
    _keep(message, context, state)
    return Message(RecordDict({SECURE_BYTES: reply}), reply_to=message)


def check_shared(message: Message, context: Context) -> None:
    """Refuse to train for a round whose keys and shares were not exchanged: nothing could be sent.

    Raises
    ------
    StaleError
    """
    if SECURE not in message.content:
        raise StaleError("the message asks for a plain update, and the run was described with secure sums")
    _due(message, context, SUM)


def masked(client: Participant, message: Message, moves: Arrays) -> ArrayRecord:
    """Return a client's moves as masked residues: they look uniform to whoever lacks a mask.

    Parameters
    ----------
    client : Participant
    message : Message
        Of the round.
    moves : dict of str to Tensor
        What it trained minus what it began with.

    Raises
    ------
    InputError, GuardError
        If a number is larger than ``server.clipping_range``, or not finite.
    StaleError
        If too few clients are left, or the client has sent such residues before.
    """
    asked: Any = message.content[SECURE]
    state = _due(message, client.context, SUM)
    numbers = torch.cat([torch.zeros(0), *(moves[name].reshape(-1) for name in sorted(moves))]).double().numpy()
    own, sources = state["client"], [int(source) for source in asked["clients"]]
    if not set(sources) <= set(state["clients"]) - {own} or len(sources) + 1 < state["needed"]:
        raise StaleError(f"{len(sources)} clients hold this one's shares, and {state['needed']} are needed")
    sealed = read_raw(message.content, SECURE_BYTES, SHARES, (len(sources), masks.SEALED), np.uint8)
    keys = dict(zip(state["clients"], state["keys"], strict=True))
    seeds, privates = dict(zip([own], state["seeds"], strict=True)), dict(zip([own], state["privates"], strict=True))
    residues, least = _residues(client, message, numbers, state["needed"])
    residues = residues + masks.mask(state["seed"], len(residues))
    for source, row in zip(sources, sealed, strict=True):
        mask_key, seal_key = keys[source][: masks.PUBLIC_KEY], keys[source][masks.PUBLIC_KEY :]
        opened = masks.unseal(masks.agree(state["seal"], seal_key), row.tobytes(), source, own)
        seeds[source], privates[source] = opened
        residues = residues + masks.pair_mask(masks.agree(state["mask"], mask_key), own, source, len(residues))
    holders = sorted(seeds)
    kept = {"seeds": [seeds[c] for c in holders], "privates": [privates[c] for c in holders], "clients": holders}
    _keep(message, client.context, {"stage": SUM, "client": own, "needed": least, **kept})
    return raw_record(MASKED, residues)


def _residues(client: Participant, message: Message, numbers: np.ndarray, needed: int) -> tuple[np.ndarray, int]:
    """Weigh a client's numbers, or clip and noise them, and round them.

    Returns
    -------
    ndarray of uint32 [n], int
        And how many of the client's neighbours must have answered before it helps to take masks off: as many as share
        the noise, where it has them all as neighbours; else ``needed``.
    """
    config = client.config
    said: Any = message.content[SECURE]
    asked, promised = int(said["asked"]), int(said["promised"])
    if not FEWEST <= promised <= asked:
        raise StaleError(f"a sum of {promised} of {asked} clients is none")
    noise = mechanism_of(config).noisy_sum(config, len(numbers), asked, promised)
    if noise is not None:
        thresholds = Thresholds.of(config.server, asked)
        if promised != thresholds.clients:
            raise StaleError(f"{promised} clients are to share the noise; by the config {thresholds.clients} do")
        if not np.isfinite(numbers).all():
            raise GuardError("the update is not finite")
        client.charge_update()
        least = promised if thresholds.shares == asked else needed
        return as_residues(noise.encode(numbers, _uniform(client, message))), max(needed, least)
    bound, largest = config.server.clipping_range, float(np.abs(numbers).max(initial=0.0))
    if not largest <= bound:  # NaN too
        remedy = f"is passed by a number of the update, {largest:.4g}; raise it, or lower the learning rate"
        raise InputError("server.clipping_range", bound, remedy)
    share = float(said["share"])
    if not 0 <= share <= 1:
        raise StaleError(f"{share} is no share of a sum")
    return FixedPoint.weighted(bound, asked).encode(share * numbers), needed


def _uniform(client: Participant, message: Message) -> Callable[[int], np.ndarray]:
    """Return the client's source of randomness: the run's seed in simulation, else the operating system's entropy."""
    if not client.context.node_config.get("simulated", False):
        return entropy.uniform
    group = map(int, message.metadata.group_id.split("/"))
    return np.random.default_rng([client.config.run.seed, client.client, *group, 0xD6]).random


def _draw_keys(asked: Mapping[str, Any], content: RecordDict, state: State) -> tuple[ArrayRecord, State]:
    """Draw the keys of a round."""
    (mask, mask_key), (seal, seal_key) = masks.key_pair(), masks.key_pair()
    found = {"stage": KEYS, "client": int(asked["client"]), "mask": mask, "seal": seal, "public": mask_key + seal_key}
    return raw_record(KEYS, joined([mask_key + seal_key], 2 * masks.PUBLIC_KEY)), found


def _share(asked: Mapping[str, Any], content: RecordDict, state: State) -> tuple[ArrayRecord, State]:
    """Divide a new seed, and the private key for masks, among the neighbours.

    Raises
    ------
    StaleError
        If keys are not all different, or few clients could put secrets together.
    """
    clients, needed, own = [int(client) for client in asked["clients"]], int(asked["needed"]), state["client"]
    rows = read_raw(content, SECURE_BYTES, KEYS, (len(clients), 2 * masks.PUBLIC_KEY), np.uint8)
    keys = [row.tobytes() for row in rows]
    public = dict(zip(clients, keys, strict=True))
    if len(public) != len(clients) or len({*keys}) != len(keys) or public.get(own) != state["public"]:
        raise StaleError("the keys of the clients are not all different, or this one's is not among them")
    # With half of the shares a server could have both secrets of a client, from two halves of its neighbours.
    if not max(FEWEST, math.floor(len(clients) / 2) + 1) <= needed <= len(clients):
        raise StaleError(f"{needed} of {len(clients)} shares are too few, or too many, to be needed")
    seed = masks.new_seed()
    seeds, privates = (masks.split(secret, needed, len(clients)) for secret in (seed, state["mask"]))
    sealed = [
        masks.seal(masks.agree(state["seal"], key[masks.PUBLIC_KEY :]), own, client, seeds[place], privates[place])
        for place, (client, key) in enumerate(zip(clients, keys, strict=True))
        if client != own
    ]
    place = clients.index(own)
    found = {"seed": seed, "seeds": [seeds[place]], "privates": [privates[place]], "clients": clients, "keys": keys}
    return raw_record(SHARES, joined(sealed, masks.SEALED)), {**state, **found, "stage": SHARES, "needed": needed}


def _unmask(asked: Mapping[str, Any], content: RecordDict, state: State) -> tuple[ArrayRecord, State]:
    """Return the shares of the seeds of those that answered, and of the private keys of those that dropped out.

    Raises
    ------
    StaleError
        If the server asks for both secrets of a client, or for the sum of too few.
    """
    active, dropped = ([int(client) for client in asked[key]] for key in ("active", "dropped"))
    place = {client: i for i, client in enumerate(state["clients"])}
    named = [*active, *dropped]
    if len({*named}) != len(named) or not set(named) <= set(place) or state["client"] not in active:
        raise StaleError("it names a client twice, or one whose shares are not here")
    if len(active) < state["needed"]:
        raise StaleError(f"{len(active)} clients answered, and {state['needed']} are needed")
    shares = [state["seeds"][place[client]] for client in active]
    shares += [state["privates"][place[client]] for client in dropped]
    return raw_record(SHARES, joined(shares, masks.SHARE)), {}


_Answer = Callable[[Mapping[str, Any], RecordDict, State], tuple[ArrayRecord, State]]
_ANSWERS: dict[str, _Answer] = {KEYS: _draw_keys, SHARES: _share, UNMASK: _unmask}
_BEFORE = {SHARES: KEYS, SUM: SHARES, UNMASK: SUM}


def _due(message: Message, context: Context, stage: str) -> State:
    """Return what the exchange before left; each is answered once, so that no mask covers two messages."""
    state: State = dict(context.state.get(SECURE) or {})
    before = _BEFORE.get(stage)
    if before is not None and (state.get("stage"), state.get("group")) != (before, message.metadata.group_id):
        raise StaleError(f"the exchange before {stage} of this round was not answered, or this one was")
    return state


def _keep(message: Message, context: Context, state: State) -> None:
    """Keep what the next exchange needs, in place of what came before; nothing after the last."""
    context.state.pop(SECURE, None)
    if state:
        context.state[SECURE] = ConfigRecord({**state, "group": message.metadata.group_id})
