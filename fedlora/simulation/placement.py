"""How many processes of a kind fit into the running Ray cluster, or on this machine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlora.errors import InputError

if TYPE_CHECKING:
    from fedlora.config import SimulationSection

_ROUNDING = 1e-9
"""Shares like 1 / 3 are not exact."""

_FREED_SECONDS = 10.0


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
    """Return how many processes fit on a machine with these resources; a share of a GPU is of one card."""
    room = []
    for need in needs:
        there = machine.get(need.resource, 0.0)
        if need.resource == "GPU" and 0 < need.amount < 1:
            room.append(int(there) * int(1 / need.amount + _ROUNDING))
        elif need.amount:
            room.append(int(there / need.amount + _ROUNDING))
    return min(room)


def count_processes(needs: Sequence[Need], what: str) -> int:
    """Return how many processes fit into the running Ray cluster at once.

    Parameters
    ----------
    needs : sequence of Need
        What one process takes.
    what : str
        Name of such a process, for errors.

    Raises
    ------
    InputError
        If not even one fits.
    """
    import ray

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


def count_workers(wanted: int | None, cpus: int, gpus: float) -> int:
    """Return how many of a simulation's workers fit into the running Ray cluster, or refuse more.

    Raises
    ------
    InputError
        If none fits, or fewer than are wanted.
    """
    fit = count_processes(_worker_needs(cpus, gpus), "worker")
    if wanted is not None and wanted > fit:
        raise InputError("simulation.workers", wanted, f"only {fit} fit; lower it, cpus_per_worker or gpus_per_worker")
    return wanted or fit


def count_free(most: int, wanted: int | None, cpus: int, gpus: float, own: tuple[float, float]) -> int:
    """Return how many workers find room in a Ray cluster that other programs use too.

    Ray frees the resources of a process some seconds after its end, so this waits for them. Ray itself would wait for
    ever for a worker without room.

    Parameters
    ----------
    most : int
        Number of workers that fit into the cluster if it is idle.
    wanted : int, optional
        ``simulation.workers``; None for as many as fit.
    cpus, gpus
        What one worker takes.
    own : (float, float)
        CPUs and GPUs that other grids of this process hold; they count as free.

    Raises
    ------
    InputError
        If there is room for none, or for fewer than are wanted.
    """
    import ray

    own_cpus, own_gpus = own
    deadline = time.monotonic() + _FREED_SECONDS
    while True:
        free = ray.available_resources()
        room = int((free.get("CPU", 0.0) + own_cpus) / cpus + _ROUNDING)
        if gpus:
            room = min(room, int((free.get("GPU", 0.0) + own_gpus) / gpus + _ROUNDING))
        if room >= most:
            return most
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    if room and wanted is None:
        return room
    held = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))
    field, value = ("simulation.workers", wanted) if room else ("simulation.cpus_per_worker", cpus)
    raise InputError(field, value, f"others hold so much that {room} workers find room ({held} free); lower it")


def in_own_process(section: SimulationSection) -> bool:
    """Return whether a run's clients train in the run's own process, without Ray.

    They do where ``simulation.workers`` is 0, and by default where this machine has room for one worker alone: it would
    import and load again, on the same GPU, what the run has in memory. A Ray that this process has started is used.
    """
    if section.workers is not None or section.address is not None:
        return section.workers == 0
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return False
    return workers_here(section) == 1


def workers_here(section: SimulationSection) -> int:
    """Return how many workers this machine has room for, by its cores and GPUs."""
    machine = {"CPU": os.cpu_count() or 1, "GPU": 0}
    if section.gpus_per_worker:
        import torch  # takes seconds, which runs on the CPU need not wait for

        machine["GPU"] = torch.cuda.device_count()
    return processes_on(machine, _worker_needs(section.cpus_per_worker, section.gpus_per_worker))


def _worker_needs(cpus: int, gpus: float) -> list[Need]:
    return [
        Need("CPU", cpus, "simulation.cpus_per_worker", cpus),
        Need("GPU", gpus, "simulation.gpus_per_worker", gpus),
    ]
