"""What a client process loads once and keeps: the data's tokens, and the frozen base model with its adapters."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from fedlora.adapters import AdaptedModel, adapt
from fedlora.alignment import aligned
from fedlora.arrays import Arrays
from fedlora.assets import cache_dir
from fedlora.communication.wire import digest
from fedlora.config import Config, MethodSection, RunSection, ServerSection, SimulationSection, load_config
from fedlora.data.tokens import FederatedData, prepare_data
from fedlora.models import load_base
from fedlora.training.fuse import fuse_blocks

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
    return prepare_data(Config.model_validate_json(config))


def client_data(config: Config) -> FederatedData:
    """Return the tokenised data of a run, shared by all clients of this process and memory-mapped.

    Runs that differ in other sections share it.
    """
    # Writing the config out for every client of a cohort would take longer than all else here.
    if not _last_data or _last_data[0][0] is not config:
        run = RunSection(seed=config.run.seed)
        part = Config(run=run, model=config.model, data=config.data, method=_NO_METHOD)
        _last_data[:] = [(config, _data(part.model_dump_json()))]
    return _last_data[0][1]


_last_data: list[tuple[Config, FederatedData]] = []


def forget_data() -> None:
    """Let the next :func:`client_data` look at the files again: a node's owner may have changed them."""
    _data.cache_clear()
    _last_data.clear()


@lru_cache(maxsize=1)
def _model(config_text: str, parameterisation: str) -> AdaptedModel:
    config = Config.model_validate_json(config_text)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapted = adapt(load_base(config, client_data(config).label_names, device), config, parameterisation)
    if config.simulation.compile:
        fuse_blocks(adapted)
    return adapted


def client_model(config: Config, parameterisation: str) -> AdaptedModel:
    """Return the base model with adapters, loaded once a process; on the GPU if this process was given one.

    Runs that differ in what is no part of the model share it: every array that is not the base's comes in a message.
    """
    keys = {"rank", "alpha", "target_modules", "exclude_modules", "dropout"}
    keys |= {"extraction", "router_init", "router_documents"}
    method = MethodSection(name="none", **config.method.model_dump(include=keys))
    server = ServerSection(batch_size=config.server.batch_size)
    simulation = SimulationSection(compile=config.simulation.compile)
    run = RunSection(seed=config.run.seed)
    part = Config(run=run, model=config.model, data=config.data, method=method, server=server, simulation=simulation)
    return _model(part.model_dump_json(), parameterisation)


def keep_initial(arrays: Arrays, key: str) -> None:
    """Store a run's frozen arrays on this host under their digest."""
    path = initial_path(key)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(save(arrays))
        os.replace(temporary, path)


@lru_cache(maxsize=2)
def initial_arrays(key: str) -> Arrays | None:
    """Return the frozen arrays of a digest, or None where this host does not hold them (whole)."""
    path = initial_path(key)
    if not path.exists():
        return None
    arrays: Arrays = {name: aligned(array) for name, array in load(path.read_bytes()).items()}
    return arrays if digest(arrays) == key else None


def initial_path(key: str) -> Path:
    """Return where the frozen arrays of a digest are kept.

    Raises
    ------
    ValueError
        If it is no digest: a server may not choose a path.
    """
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise ValueError("the name of the frozen arrays is no SHA-256")
    return cache_dir() / "initial" / f"{key}.safetensors"
