"""Loggers beside the run folder: TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora.config import Config
from fedlora.errors import InputError

Tracker = Callable[[dict[str, Any]], None]
"""Takes a line of rounds.jsonl."""


def open_trackers(config: Config, folder: Path) -> list[Tracker]:
    """Open the loggers that ``[tracking]`` asks for.

    Raises
    ------
    InputError
        If one is asked for whose package is not installed.
    """
    trackers = []
    if config.tracking.tensorboard:
        trackers.append(_tensorboard(folder))
    if config.tracking.wandb:
        trackers.append(_wandb(config, folder))
    return trackers


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """Flatten a round into named numbers, such as ``test/accuracy`` and ``bytes/uplink_bytes``."""
    groups = {"test": line["metrics"], "bytes": line["communication"], "seconds": line["seconds"]}
    flat = {f"{group}/{k}": v for group, values in groups.items() for k, v in values.items()}
    flat |= {
        "train/loss": line["train_loss"],
        "privacy/epsilon": line["epsilon"],
        "clients/failed": len(line["failed"]),
    }
    return {name: float(value) for name, value in flat.items() if isinstance(value, int | float)}


def _tensorboard(folder: Path) -> Tracker:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("tracking.tensorboard", True, "its package is missing; pip install tensorboard") from None
    writer = SummaryWriter(str(folder / "tensorboard"))

    def track(line: dict[str, Any]) -> None:
        for name, value in scalars(line).items():
            writer.add_scalar(name, value, line["round"])
        writer.flush()

    return track


def _wandb(config: Config, folder: Path) -> Tracker:
    try:
        import wandb
    except ImportError:
        raise InputError("tracking.wandb", True, "its package is missing; pip install wandb") from None
    run = wandb.init(project=config.tracking.project, name=config.run.name, dir=str(folder), config=config.model_dump())

    def track(line: dict[str, Any]) -> None:
        run.log(scalars(line), step=line["round"])

    return track
