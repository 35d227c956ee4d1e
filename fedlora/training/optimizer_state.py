"""What a local optimiser remembers, client by client: taken out after a round, and put back before the next one.

The state of one client is a dict of arrays without the client axis, named ``KEY:NAME`` by torch's key (``exp_avg``) and
the trained array. All are of the trained array's dtype.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch

from fedlora.arrays import Arrays
from fedlora.config import ClientSection

_STEP = "step"
"""Torch's key of the number of steps that an array has taken: one for all clients of a pass."""


def state_size(client: ClientSection) -> int:
    """Return how many numbers an optimiser remembers for every number that it trains."""
    if client.optimizer == "adamw":
        return 2
    return 1 if client.momentum else 0


def array_of(name: str) -> str:
    """Return the trained array that a state's array belongs to."""
    return name.partition(":")[2]


def is_count(name: str) -> bool:
    """Whether a state's array is a number of steps, and no array of the trained one's shape."""
    return name.partition(":")[0] == _STEP


def steps_taken(state: Arrays) -> Hashable:
    """Return what clients that share a pass must have in common: which arrays have a state, and after which steps."""
    return frozenset((name, float(array) if is_count(name) else None) for name, array in state.items())


def put_states(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], states: Sequence[Arrays]
) -> None:
    """Give an optimiser what it remembered of each client.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    parameters : mapping of str to Tensor [K, ...]
        The trained ones.
    states : sequence of K dicts
        A client without a state begins anew.

    Raises
    ------
    ValueError
        If the clients took other steps.
    """
    if len({steps_taken(state) for state in states}) > 1:
        raise ValueError("the clients of a cohort must have taken equally many steps")
    for full, first in states[0].items():
        p, key = parameters[array_of(full)], full.partition(":")[0]
        if is_count(full):
            optimizer.state[p][key] = first.detach().to("cpu", torch.float32).clone()
        else:
            optimizer.state[p][key] = torch.stack([state[full] for state in states]).to(p.device, p.dtype)


def take_states(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], clients: Sequence[int]
) -> list[Arrays]:
    """Copy what an optimiser remembers of some clients to the CPU; the opposite of :func:`put_states`."""
    found: list[Arrays] = [{} for _ in clients]
    chosen = torch.tensor(clients)
    for name, p in parameters.items():
        for key, value in optimizer.state[p].items() if p in optimizer.state else ():
            if not isinstance(value, torch.Tensor):
                continue  # sgd's momentum before the first step
            if key == _STEP:
                rows = [value.to(p.dtype, copy=True)] * len(clients)
            else:
                rows = list(value.index_select(0, chosen.to(value.device)).cpu())
            for state, row in zip(found, rows, strict=True):
                state[f"{key}:{name}"] = row
    return found
