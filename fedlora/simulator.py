"""Run a federation on simulated clients: the function behind ``fedlora run``."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from fedlora import simulation
from fedlora.capacity import Capacity
from fedlora.config import NODES, SERVER, Config, load_config, unused_keys
from fedlora.data.sources import materialise, with_absolute_paths
from fedlora.data.tokens import FederatedData, prepare_data
from fedlora.errors import InputError
from fedlora.models import load_base
from fedlora.notebook import shown
from fedlora.privacy.banded import band_advice, compare_bands
from fedlora.privacy.calibration import local_steps
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.privacy.units import compare_units, unit_advice
from fedlora.results.finished import RunResult
from fedlora.results.folder import RunFolder, run_folder
from fedlora.results.identity import check_data
from fedlora.results.user_code import UserCode, describe, describe_app, with_user_code
from fedlora.roles import trained_kinds
from fedlora.simulation import CLIENT_APP, LocalGrid, SimulatedGrid
from fedlora.simulation.placement import in_own_process
from fedlora.strategies.base import FederatedStrategy, get_strategy
from fedlora.strategies.callbacks import Progress
from fedlora.strategies.federation import Federation
from fedlora.strategies.server_app import resolve
from fedlora.timeline import phase
from fedlora.training.dp import choose_ghost_norms
from fedlora.training.step_memory import check_checkpointing

if TYPE_CHECKING:
    import datasets

log = logging.getLogger("fedlora")


def simulate(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    data: datasets.Dataset | Mapping[str, datasets.Dataset] | None = None,
    strategy: Strategy | Callable[[Config], Strategy] | None = None,
    client_app: ClientApp | str = CLIENT_APP,
    progress: Progress | None = None,
) -> RunResult:
    """Simulate a federation.

    Parameters
    ----------
    config : str, Path or Mapping
        A TOML file, TOML text, or its parsed content.
    overrides : Mapping, optional
        ``section.key`` to value, as ``--set`` on the command line.
    output : str or Path, optional
        The run folder; runs/NAME by default. It must not exist, unless ``resume`` is set.
    resume : bool
        Go on with the run in ``output``; a finished one is returned as it is.
    data : datasets.Dataset, or mapping of split to Dataset, optional
        Examples in memory, instead of ``data.name``.
    strategy : Strategy or callable, optional
        A Flower Strategy, or a function or class that makes one from the config, which configures and aggregates the
        rounds instead of the method's own.
    client_app : ClientApp or str
        The client half; fedlora's own by default.
    progress : Progress, optional
        Hooks for a display; by default a bar in a notebook, and nothing elsewhere.

    Returns
    -------
    RunResult
        ``.summary`` is the content of summary.json, ``.folder`` the run folder.

    Raises
    ------
    InputError
        If something that the user gave is wrong.
    RunError
        If the run cannot go on.

    Examples
    --------
    >>> from fedlora import simulate
    >>> result = simulate("experiments/quickstart.toml", {"method.rank": 4})  # doctest: +SKIP
    >>> result.summary["final"]["accuracy"]  # doctest: +SKIP
    """
    started = time.perf_counter()
    if data is not None:
        overrides = {**(overrides or {}), "data.name": materialise(data)}
    given = load_config(config, overrides)
    method = get_strategy(given.method.name)
    check_simulated(given)
    check_device(given)
    path = Path(output) if output is not None else Path("runs") / given.run.name
    # Create the folder before the data and the model are loaded, which may take long: it may not be writable.
    chosen = with_absolute_paths(_resolve_cohorts(resolve(given)))
    rounds = _make_strategy(strategy, chosen)
    own = _user_code(rounds, client_app)
    given, chosen = with_user_code(given, own), with_user_code(chosen, own)
    with run_folder(path, given, chosen, resume=resume) as folder:
        folder.user_code = {key: asdict(code) for key, code in own.items()}
        if folder.finished:
            log.info("%s is finished already", path)
            return folder.result()
        for note in unused_keys(given):
            log.info("note: %s", note)
        with shown(given, progress) as display:
            return _run(folder, method, rounds, client_app, display, started)


def _run(
    folder: RunFolder,
    method: type[FederatedStrategy],
    rounds: Strategy | None,
    client_app: ClientApp | str,
    progress: Progress | None,
    started: float,
) -> RunResult:
    """Prepare the data, start the workers and run the rounds."""
    tokens = _prepare(folder, method)
    config = folder.resolved
    # A strategy of the method's own class replaces the method; any other one only configures and aggregates.
    whole = rounds if isinstance(rounds, method) else method(config)
    keep = False
    try:
        with _settled_heap(), _open_grid(client_app, folder, tokens, progress) as grid:
            result = Federation(
                config, grid, folder, tokens, whole, training=rounds, progress=progress, started=started, simulated=True
            ).run()
        keep = config.simulation.workers == 0
        return result
    finally:
        if not keep:
            from fedlora.clients.resources import forget_model

            # The clients' model, if it is in this process: a run that was stopped may have left it amid a change, and
            # one that did not ask for this process leaves it the memory.
            forget_model()


def _prepare(folder: RunFolder, method: type[FederatedStrategy]) -> FederatedData:
    """Load the data, check everything that does not need the model's weights, and write the partition."""
    config = folder.resolved
    tokens = prepare_data(config)
    check_data(folder, config, tokens)
    with phase("calibration", "calibrating the noise"):
        _check_clients(config, tokens)
    # Check target modules and rank on the model's skeleton, before its weights are loaded.
    with phase("skeleton", "checking the model's layers"):
        skeleton = method.adapt(load_base(config, tokens.label_names, "meta"), config)
    check_checkpointing(skeleton, config.client)
    if mechanism_of(config).clips_examples:
        names = skeleton.names(trained_kinds(method.roles(config, 1)))
        longest, units = int(tokens.train.lengths.max()), config.privacy.samples_units
        log.info(_ghost_norms(choose_ghost_norms(skeleton, names, longest, units)))
    advice = unit_advice(compare_units(config, tokens.typical_units()))
    advice = advice or band_advice(compare_bands(config, len(tokens.partition)))
    tokens.notes += [advice] if advice else []
    counts = tokens.label_counts()
    folder.write_partition(tokens.client_names, tokens.counted_names, counts.tolist())
    return tokens


def _open_grid(
    client_app: ClientApp | str, folder: RunFolder, tokens: FederatedData, progress: Progress | None
) -> SimulatedGrid:
    """Start the workers of a run."""
    config = folder.resolved
    section = config.simulation
    run_config = {"config": config.to_toml()}

    def keep_capacity(capacity: Capacity) -> None:
        """Store what was chosen or lowered, for a resumed run too, and let all clients begin so from now on."""
        if capacity.note:
            log.info("%s", capacity.note)
            if progress is not None:
                progress.on_note(capacity.note)
        elif capacity.clients != folder.resolved.simulation.cohort_size:
            log.info("%d clients train in one pass", capacity.clients)
        chosen = _with_capacity(folder.resolved, capacity)
        if chosen != folder.resolved:
            folder.set_resolved(chosen)
            run_config["config"] = chosen.to_toml()

    here = in_own_process(section)
    if here and section.workers is None:
        log.info("one worker fits: clients train in the run's own process (simulation.workers = 1 starts a worker)")
    kind = LocalGrid if here else simulation.RayGrid  # imports Ray
    return kind(
        client_app,
        len(tokens.partition),
        workers=section.workers,
        cpus_per_worker=section.cpus_per_worker,
        gpus_per_worker=section.gpus_per_worker,
        cohort_size=section.cohort_size,
        address=section.address,
        run_config=run_config,
        states=folder.checkpoint.states,
        work=lambda client: local_steps(config, tokens.drawn_from(client, config.privacy)),
        on_capacity=keep_capacity,
    )


def _user_code(strategy: Strategy | None, client_app: ClientApp | str) -> dict[str, UserCode]:
    own = {} if strategy is None else {"strategy": describe(strategy)}
    return own if client_app == CLIENT_APP else {**own, "client_app": describe_app(client_app)}


@contextmanager
def _settled_heap() -> Iterator[None]:
    """Keep the garbage collector from walking all loaded objects in the middle of a round."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def check_simulated(config: Config) -> None:
    """Refuse examples that only real nodes have."""
    if config.data.name == NODES:
        remedy = "means examples on real nodes; name the examples to simulate on, or run on nodes with --on"
        raise InputError("data.name", NODES, remedy)
    if config.data.test == SERVER:
        raise InputError("data.test", SERVER, "is reserved for nodes; name a split or a file")


def _make_strategy(given: Strategy | Callable[[Config], Strategy] | None, config: Config) -> Strategy | None:
    if isinstance(given, type) and given.__module__.startswith("flwr."):
        raise InputError("strategy", given.__name__, "is a class of Flower's; give an instance of it")
    made = given(config) if callable(given) else given
    if made is not None and not isinstance(made, Strategy):
        remedy = "is no Strategy; give one of flwr.serverapp.strategy, or a function that makes one from the config"
        raise InputError("strategy", type(made).__name__, remedy)
    return made


def check_device(config: Config) -> None:
    """Refuse GPUs that this machine does not have."""
    section, key = config.simulation, "simulation.gpus_per_worker"
    if not section.gpus_per_worker or section.address is not None:
        return
    if not torch.cuda.is_available():
        raise InputError(key, section.gpus_per_worker, "this machine has no GPU; set it to 0 to run on the CPU")
    if section.gpus_per_worker > (there := torch.cuda.device_count()):
        raise InputError(key, section.gpus_per_worker, f"this machine has {there}; lower it")


def _ghost_norms(chosen: Mapping[str, bool]) -> str:
    """Describe the choice between ghost norms and per-example gradients."""
    ghost = sum(chosen.values())
    return f"per-example clipping by ghost norms in {ghost} weights, by per-example gradients in {len(chosen) - ghost}"


def _check_clients(config: Config, data: FederatedData) -> None:
    """Refuse a budget that the smallest client (by its sampling rate) or the largest (by its delta) cannot keep.

    The smallest comes first: the epsilon that its error names is reached by all.
    """
    sizes = data.drawn_sizes(config.privacy)
    for client in (int(np.argmin(sizes)), int(np.argmax(sizes))):
        mechanism_of(config).plan(config, sizes[client], data.units_of(client, config.privacy))
    mechanism_of(config).server_plan(config, len(data.partition))


def _resolve_cohorts(config: Config) -> Config:
    """Resolve ``cohort_size = "auto"`` to one client on the CPU, so that the result does not depend on the machine.

    On a GPU the size is measured at the start of the first round, and then kept.
    """
    if config.simulation.cohort_size != "auto" or config.simulation.gpus_per_worker > 0:
        return config
    return _with_capacity(config, Capacity(1))


def _with_capacity(config: Config, capacity: Capacity) -> Config:
    """Return the config with what a worker chose; where workers differ, with what needs the least memory."""
    simulation = config.simulation.model_copy(update={"cohort_size": capacity.clients})
    found = {key.removeprefix("client."): value for key, value in capacity.settings.items()}
    if rows := [n for n in (config.client.physical_batch_size, found.get("physical_batch_size")) if n]:
        found["physical_batch_size"] = min(rows)
    client = config.client.model_copy(update=found)
    return config.model_copy(update={"simulation": simulation, "client": client})
