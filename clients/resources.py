"""What a client process loads once and keeps: the data's tokens, and the frozen base model with its adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlora.adapters import AdaptedModel
from fedlora.config import Config, MethodSection, RunSection, ServerSection, SimulationSection, load_config
from fedlora.data.tokens import FederatedData, prepare_data
from fedlora.devices import gpus
from fedlora.methods import get_method
from fedlora.shared_base import shared_base
from fedlora.timeline import phase
from fedlora.training.fuse import compiles, fuse_blocks

_NO_METHOD = MethodSection(name="none")


def run_config(values: Mapping[str, Any]) -> Config:
    """Read the run's config from Flower's run config: its key ``config`` is TOML text or a path.

    A relative path is looked for in the working directory, then beside the app.
    """
    return _config(str(values["config"]))


@lru_cache(maxsize=4)
def _config(source: str) -> Config:
    beside = Path(__file__).parents[1] / source if "\n" not in source else None
    if beside is not None and not Path(source).is_file() and beside.is_file():
        return load_config(beside)
    return load_config(source)


@lru_cache(maxsize=2)
def _data(config: str) -> FederatedData:
    return prepare_data(Config(method=_NO_METHOD, **json.loads(config)))


def client_data(config: Config) -> FederatedData:
    """Return the tokenised data of a run, shared by all clients of this process and memory-mapped.

    Runs that differ in other sections share it.
    """
    # Writing the config out for every client of a cohort would take longer than all else here.
    if not _last_data or _last_data[0][0] is not config:
        run = RunSection(seed=config.run.seed)
        privacy = config.privacy.of_examples()
        part = Config(run=run, model=config.model, data=config.data, method=_NO_METHOD, privacy=privacy)
        _last_data[:] = [(config, _data(part.model_dump_json(exclude={"method"})))]
    return _last_data[0][1]


_last_data: list[tuple[Config, FederatedData]] = []


def forget_data() -> None:
    """Let the next :func:`client_data` look at the files again: a node's owner may have changed them."""
    _data.cache_clear()
    _last_data.clear()


@lru_cache(maxsize=1)
@phase("model", "loading the model")
def _model(config_text: str) -> AdaptedModel:
    config = Config.model_validate_json(config_text)
    base = shared_base(config, client_data(config).label_names, gpus(config))
    adapted = get_method(config.method.name).adapt(base, config)
    if config.simulation.compile is True:
        fuse_blocks(adapted)
    return adapted


_last_model: list[tuple[Config, AdaptedModel]] = []


def forget_model() -> None:
    """Let the next :func:`client_model` load the model anew."""
    _model.cache_clear()
    _last_model.clear()


def loaded_model() -> AdaptedModel | None:
    """Return the model of the last :func:`client_model`, if any."""
    return _last_model[0][1] if _last_model else None


def client_model(config: Config) -> AdaptedModel:
    """Return the base model with adapters, loaded once a process; on the GPUs that this process was given, if any.

    Runs that differ in what is no part of the model share it: every array that is not the base's comes in a message.
    """
    # As for the data: not for every client of a cohort.
    if not _last_model or _last_model[0][0] is not config:
        server = ServerSection(batch_size=config.server.batch_size)
        placed = config.simulation
        fused = compiles(config, client_data(config))
        simulation = SimulationSection(compile=fused, gpus_per_worker=placed.gpus_per_worker)
        run = RunSection(seed=config.run.seed)
        part = Config(
            run=run,
            model=config.model,
            data=config.data,
            method=config.method,
            privacy=config.privacy.of_examples(),
            server=server,
            simulation=simulation,
        )
        _last_model[:] = [(config, _model(part.model_dump_json()))]
    return _last_model[0][1]
