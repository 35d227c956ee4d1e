"""Processes on one Ray cluster that execute a study's runs, each one run after the other.

A process keeps libraries, base model and data loaded between runs, and the run's clients train in it. A run then costs
little more than its training.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import ray
import torch

from fedlora.config import Config, load_config
from fedlora.errors import InputError, RunError
from fedlora.results.folder import RunFolder
from fedlora.simulation.placement import Need, count_processes
from fedlora.simulation.ray_cluster import start_ray
from fedlora.simulator import simulate
from fedlora.status import DOING, written
from fedlora.study.config import StudyConfig
from fedlora.study.plan import Plan
from fedlora.study.state import set_aside

_LOCK_SECONDS = 60.0
"""Seconds to wait for the processes of a killed study to end, since they hold the checkpoints of their runs."""


class Runner:
    """The process that executes runs; a Ray actor.

    Parameters
    ----------
    cpus : int
        Threads.
    gpus : float
        Share of a GPU, and of its memory; 0 for none.
    command : list of str
        The user's, for the runs' summaries.
    """

    def __init__(self, cpus: int, gpus: float, command: list[str]) -> None:
        sys.argv = command
        torch.set_num_threads(cpus)
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        elif gpus < 1:
            torch.cuda.set_per_process_memory_fraction(gpus)

    def ready(self) -> bool:
        """Return once everything is imported."""
        return True

    def run(self, config: str, study: str, folder: str) -> dict[str, Any]:
        """Execute or resume a run; return its ``summary``, or a one-line ``error`` and the ``traceback``."""
        try:
            place = Path(study) / folder
            resume = place.exists() and _can_go_on(load_config(config), Path(study), place)
            with written(doing_file(Path(study), folder)):
                return {"summary": simulate(config, output=place, resume=resume).summary}
        except (InputError, RunError) as error:
            return {"error": str(error).strip(), "traceback": traceback.format_exc()}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}".strip(), "traceback": traceback.format_exc()}
        finally:
            gc.collect()  # models have reference cycles, which would hold their memory
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def doing_file(study: Path, folder: str) -> Path:
    """Return the file that says what a run does: not in its folder, which the run itself may move or delete."""
    return study / f".{folder.replace('/', '.')}{DOING}"


def _can_go_on(config: Config, study: Path, place: Path) -> bool:
    """Return whether an unfinished run can be resumed; if not, move its folder aside."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            RunFolder.resume(place, config).close()
            return True
        except InputError as error:
            if "another process" in error.remedy and time.monotonic() < deadline:
                time.sleep(1)
                continue
            set_aside(study, place)
            return False


def start_process(study: StudyConfig, config: Config) -> Any:
    """Start a :class:`Runner` as a Ray actor; it begins when the cluster has room."""
    section = config.simulation
    memory = int(study.budget.memory_per_run * 2**30)
    actor = ray.remote(num_cpus=section.cpus_per_worker, num_gpus=section.gpus_per_worker, memory=memory)(Runner)
    return actor.remote(section.cpus_per_worker, section.gpus_per_worker, sys.argv)


def count_runs(study: StudyConfig, config: Config) -> int:
    """Return how many runs fit into the running Ray cluster at once, by cores, GPUs and memory.

    Raises
    ------
    InputError
        If not even one fits.
    """
    section, memory = config.simulation, study.budget.memory_per_run
    needs = [
        Need("CPU", section.cpus_per_worker, "simulation.cpus_per_worker", section.cpus_per_worker),
        Need("GPU", section.gpus_per_worker, "simulation.gpus_per_worker", section.gpus_per_worker),
        Need("memory", memory * 2**30, "budget.memory_per_run", memory),
    ]
    room = count_processes(needs, "run")
    return min(room, study.budget.runs or room)


def capacity(plan: Plan) -> tuple[int, int]:
    """Return how many runs a study would execute in parallel on this machine, and on how many GPUs (0: on cores).

    Raises
    ------
    InputError
        If not even one fits.
    """
    started = start_ray(address_of(plan.study))
    try:
        config = plan.runs[0].config
        there = sum(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
        gpus = max(1, int(there)) if config.simulation.gpus_per_worker else 0
        return count_runs(plan.study, config), gpus
    finally:
        if started:
            ray.shutdown()


def address_of(study: StudyConfig) -> str | None:
    """Return the Ray cluster that the study's base config names."""
    address: str | None = study.base.get("simulation", {}).get("address")
    return address


def begun(reference: Any, runner: Any) -> Any:
    """Return a runner that has answered ``ready``.

    Raises
    ------
    RunError
        If it could not start.
    """
    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise RunError(f"a process for runs cannot be started: {reason}") from None
    return runner
