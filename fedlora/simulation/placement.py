"""How many processes of a kind fit into the running Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from fedlora.errors import InputError

_ROUNDING = 1e-9
"""Shares like 1 / 3 are not exact."""


@dataclass(frozen=True)
class Need:
    """What a process takes of one of Ray's resources.

    Attributes
    ----------
    resource : str
        CPU, GPU or memory (bytes).
    amount : float
        0 for none.
    key : str
        The config's key that says so.
    value : object
        What the config says there.
    """

    resource: str
    amount: float
    key: str
    value: Any


def processes_on(machine: Mapping[str, float], needs: Sequence[Need]) -> int:
    """Say how many processes fit on a machine with these resources; a share of a GPU is of one card."""
    room = []
    for need in needs:
        there = machine.get(need.resource, 0.0)
        if need.resource == "GPU" and 0 < need.amount < 1:
            room.append(int(there) * int(1 / need.amount + _ROUNDING))
        elif need.amount:
            room.append(int(there / need.amount + _ROUNDING))
    return min(room)


def count_processes(needs: Sequence[Need], what: str) -> int:
    """Say how many processes fit side by side into the running Ray cluster.

    Parameters
    ----------
    needs : sequence of Need
        Of one process.
    what : str
        What errors call it.

    Raises
    ------
    InputError
        If not even one fits.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = [need for need in needs if need.amount]
    for need in wanted:
        if any(processes_on(machine, [need]) for machine in machines):
            continue
        most = max((machine.get(need.resource, 0) for machine in machines), default=0)
        if need.resource == "GPU" and not most:
            raise InputError(need.key, need.value, "Ray sees no GPU; set it to 0 to run on the CPU")
        there = f"{most / 2**30:.1f} GiB" if need.resource == "memory" else f"{most:g}"
        remedy = f"no machine has room for a {what} (the most there is: {there}); lower it"
        raise InputError(need.key, need.value, remedy)
    room = sum(processes_on(machine, wanted) for machine in machines)
    if not room:
        last = wanted[-1]
        together = ", ".join(need.key for need in wanted)
        raise InputError(last.key, last.value, f"no machine has room for a {what} with all of {together}; lower one")
    return room
