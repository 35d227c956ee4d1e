"""Forecast what a run costs before it starts: bytes, steps and noise are exact, seconds are estimated."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from fedlora.clients.resources import client_data
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.devices import gpus
from fedlora.errors import InputError
from fedlora.models import load_base
from fedlora.privacy.banded import BandNoise, compare_bands
from fedlora.privacy.calibration import local_steps
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.privacy.units import UnitNoise, compare_units
from fedlora.strategies.base import get_strategy
from fedlora.study.plan import PlannedRun
from fedlora.timeline import phase
from fedlora.training import ClientJob, train_cohort

_START_SECONDS, _LOAD_SECONDS = 20.0, 3.0
"""Typical start-up and per-run overhead, in seconds."""

_PROBED_CLIENTS = 8
_EVALUATION = 0.4
"""Time of an evaluation batch, as a fraction of a training step's."""


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run.

    Attributes
    ----------
    clients : int
    trainable_parameters : int
    initial_bytes, downlink_bytes, uplink_bytes : int
        Payload of all clients and rounds, as communication.csv will list it.
    steps : int
        Local steps of all clients and rounds.
    evaluated_examples : int
        Test and validation examples, counted once for each evaluation.
    noise_multipliers : list of float
        One for each client, in order, or one of the server's; empty without privacy.
    ranks : list of int or "full"
        Of each client, in order; empty where clients have no ranks of their own.
    unit_noise : list of UnitNoise
        Where persons are protected: the noise of the run's way to do so, then of the other way, for a typical client.
    band_noise : list of BandNoise
        Where the server's noise is correlated over rounds: what other numbers of bands would give, too.
    """

    clients: int
    trainable_parameters: int
    initial_bytes: int
    downlink_bytes: int
    uplink_bytes: int
    steps: int
    evaluated_examples: int
    noise_multipliers: list[float]
    ranks: list[int | Literal["full"]]
    unit_noise: list[UnitNoise] = field(default_factory=list)
    band_noise: list[BandNoise] = field(default_factory=list)

    @property
    def payload_bytes(self) -> int:
        """Sum over all directions."""
        return self.initial_bytes + self.downlink_bytes + self.uplink_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-compatible values."""
        return asdict(self)


def forecast(config: Config) -> Forecast:
    """Forecast a run's bytes and noise from its partition, the model's skeleton and the method's formula.

    Parameters
    ----------
    config : Config
        Resolved.

    Raises
    ------
    InputError
        If the run is impossible: because of its data, partition, rank or privacy budget.
    """
    data = client_data(config)
    strategy = get_strategy(config.method.name)(config)
    strategy.nodes = {client: client for client in range(len(data.partition))}
    planned = strategy.planned(strategy.server_model(data, "meta"))
    sizes = data.drawn_sizes(config.privacy)
    mechanism = mechanism_of(config)
    units = [data.units_of(client, config.privacy) for client in range(len(sizes))]
    smallest = sizes.index(min(sizes))
    mechanism.plan(config, sizes[smallest], units[smallest])  # first: the epsilon that its error names is all clients'
    plans = [*map(partial(mechanism.plan, config), sizes, units), mechanism.server_plan(config, len(sizes))]
    rounds, every = range(1, config.run.rounds + 1), config.server.evaluate_every
    # Before the first round if so configured, in rounds that are due, and after the last.
    evaluations = config.server.evaluate_start + 1 + sum(server_round % every == 0 for server_round in rounds[:-1])
    again = planned.final_evaluations - 1
    validation = len(data.validation) if data.validation is not None else 0
    return Forecast(
        clients=len(sizes),
        trainable_parameters=planned.trainable_parameters,
        initial_bytes=planned.initial_bytes,
        downlink_bytes=planned.downlink_bytes,
        uplink_bytes=planned.uplink_bytes,
        steps=sum(
            local_steps(exchange.training(config), sizes[client])
            for server_round in (0, *rounds)
            for exchange in strategy.exchanges_of(config, server_round)
            for client in strategy.sample(server_round)
        ),
        evaluated_examples=(evaluations + again) * len(data.test) + evaluations * validation,
        noise_multipliers=[plan.noise_multiplier for plan in plans if plan is not None],
        ranks=list(planned.ranks),
        unit_noise=compare_units(config, data.typical_units()),
        band_noise=compare_bands(config, len(sizes)),
    )


def forecast_all(runs: Iterable[PlannedRun]) -> dict[str, Forecast | InputError]:
    """Forecast runs, by folder; an impossible run has its error instead.

    Raises
    ------
    InputError
        If every run is impossible.
    """
    found: dict[str, Forecast | InputError] = {}
    known: dict[str, Forecast | InputError] = {}
    # Runs on the same examples follow each other, so that the examples are opened once.
    in_turn = sorted(runs, key=lambda r: (r.config.run.seed, r.config.data.model_dump_json()))
    with phase("forecast", "planning runs", len(in_turn)) as here:
        for run in in_turn:
            key = run.config.model_copy(update={"run": run.config.run.model_copy(update={"name": "run"})})
            text = key.model_dump_json(exclude={"client": {"learning_rate"}})
            if text not in known:
                try:
                    known[text] = forecast(run.config)
                except InputError as error:
                    known[text] = error
            found[run.folder] = known[text]
            here.advance()
    errors = [error for error in found.values() if isinstance(error, InputError)]
    if errors and len(errors) == len(found):
        raise errors[0]
    return found


@dataclass(frozen=True)
class StepCost:
    """What a client's local step takes here.

    Attributes
    ----------
    seconds : float
    memory_bytes : int
        The most that the process held: resident memory, or allocated memory of its GPUs.
    clients : int
        That trained together, and held it.
    """

    seconds: float
    memory_bytes: int
    clients: int


@phase("probe", "measuring a step")
def measure_step(config: Config) -> StepCost:
    """Measure a client's local step here, on the run's own model and examples.

    On a GPU the clients of a cohort train together, as they do in the run.
    """
    data = client_data(config)
    device = gpus(config) if config.simulation.gpus_per_worker else (torch.device("cpu"),)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.simulation.cpus_per_worker)
    try:
        method = get_strategy(config.method.name)
        adapted = method.adapt(load_base(config, data.label_names, device), config)
        arrays = method(config).probe(adapted, data)
        jobs = _jobs(config, data, arrays, 1 if device[0].type == "cpu" else _PROBED_CLIENTS)
        one_step = config.model_copy(
            update={"client": config.client.model_copy(update={"local_steps": 1, "local_epochs": None})}
        )
        train_cohort(adapted, data.train, jobs, one_step)  # the first step allocates
        began = time.perf_counter()
        train_cohort(adapted, data.train, jobs, one_step)
        seconds = time.perf_counter() - began
        return StepCost(seconds / len(jobs), _peak_bytes(device), len(jobs))
    finally:
        torch.set_num_threads(threads)


def estimate_seconds(
    runs: Iterable[PlannedRun], forecasts: dict[str, Forecast | InputError], at_once: int, gpus: int
) -> float:
    """Estimate the time of runs side by side, from one measured step for each model, batch size and kind of adapter.

    Parameters
    ----------
    runs : iterable of PlannedRun
    forecasts : dict
        From :func:`forecast_all`.
    at_once : int
        Runs side by side.
    gpus : int
        Runs that share a GPU share its time; 0 where each has cores of its own.
    """
    measured: dict[str, StepCost] = {}
    training = overhead = 0.0
    for run in runs:
        expected = forecasts[run.folder]
        if isinstance(expected, InputError):
            continue
        trained = get_strategy(run.config.method.name).parameterisation
        settings = run.config.client.batch_size, run.config.privacy.mode, run.config.data.packing
        key = f"{run.config.model!r} {trained} {settings}"
        if key not in measured:
            measured[key] = measure_step(run.config)
        training += (expected.steps + _evaluation_steps(expected, run.config)) * measured[key].seconds
        overhead += _LOAD_SECONDS
    return _START_SECONDS + training / (gpus or at_once) + overhead / at_once


def run_seconds(config: Config, expected: Forecast, step: StepCost, workers: int) -> float:
    """Estimate the time of one run: its clients train side by side, and the server evaluates alone.

    Parameters
    ----------
    config : Config
    expected : Forecast
    step : StepCost
    workers : int
        That train at once.
    """
    at_once = max(1, min(workers, round(config.server.fraction_train * expected.clients)))
    steps = expected.steps / at_once + _evaluation_steps(expected, config)
    return _START_SECONDS + _LOAD_SECONDS + steps * step.seconds


def _evaluation_steps(expected: Forecast, config: Config) -> float:
    """Return how many local steps take as long as the run's evaluations."""
    return _EVALUATION * expected.evaluated_examples / config.client.batch_size


def _peak_bytes(device: Sequence[torch.device]) -> int:
    if device[0].type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return sum(torch.cuda.max_memory_allocated(card) for card in device)


def _jobs(config: Config, data: FederatedData, arrays: Any, most: int) -> list[ClientJob]:
    jobs = []
    for client in range(min(most, len(data.partition))):
        rows = data.partition[client]
        drawn, units = data.drawn_from(client, config.privacy), data.units_of(client, config.privacy)
        plan = mechanism_of(config).plan(config, drawn, units)
        assert config.client.learning_rate is not None
        jobs.append(ClientJob(client, 1, rows, arrays, config.client.learning_rate, plan))
    return jobs
