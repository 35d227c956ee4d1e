"""What one run will take: its forecast, and memory and time from one measured step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config import Config, load_config
from fedlora.errors import InputError
from fedlora.simulation.placement import workers_here
from fedlora.simulator import check_device, check_simulated
from fedlora.strategies.server_app import resolve
from fedlora.study.forecast import Forecast, StepCost, forecast, measure_step, run_seconds
from fedlora.timeline import phase


@dataclass(frozen=True)
class Estimate:
    """What a simulation will take.

    Attributes
    ----------
    config : Config
        Resolved.
    forecast : Forecast
    workers : int
        Processes that train clients.
    step : StepCost, optional
        None where the run cannot train on this machine.
    obstacle : str
        Why it cannot.
    """

    config: Config
    forecast: Forecast
    workers: int
    step: StepCost | None
    obstacle: str = ""

    @property
    def seconds(self) -> float:
        """The whole run's; nan where it cannot train here."""
        return float("nan") if self.step is None else run_seconds(self.config, self.forecast, self.step, self.workers)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible values; what is not known is None, or not finite."""
        given = self.config
        about = {"task": given.model.task, "model": given.model.name, "data": given.data.name}
        about["method"] = given.method.name
        expected = self.forecast.to_dict() | {"payload_bytes": self.forecast.payload_bytes}
        measured = {"memory_bytes": None if self.step is None else self.step.memory_bytes, "seconds": self.seconds}
        return about | expected | {"workers": self.workers} | measured


def estimate(config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Estimate:
    """Forecast a run and measure one of its steps; nothing is written but cached models, data and tokens.

    Parameters
    ----------
    config, overrides
        As for :func:`fedlora.simulate`.

    Raises
    ------
    InputError
        If the run is impossible: because of its config, data, partition, rank or privacy budget.
    """
    given = load_config(config, overrides)
    check_simulated(given)
    chosen = resolve(given)
    with phase("forecast", "planning the run"):
        expected = forecast(chosen)
    try:
        _check_local(chosen)
    except InputError as error:
        # A plan may be printed on another machine than the one that will run it.
        return Estimate(chosen, expected, chosen.simulation.workers or 1, None, str(error))
    workers = workers_here(chosen.simulation) if chosen.simulation.workers is None else chosen.simulation.workers
    return Estimate(chosen, expected, max(1, workers), measure_step(chosen))


def _check_local(config: Config) -> None:
    if config.simulation.address is not None:
        remedy = "is a cluster, which is not measured; leave it out to estimate for this machine"
        raise InputError("simulation.address", config.simulation.address, remedy)
    check_device(config)
