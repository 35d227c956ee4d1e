"""Loggers beside the run folder: TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedlora.config import Config
from fedlora.errors import InputError


class Tracker(ABC):
    """Logs a run's rounds elsewhere.

    Parameters
    ----------
    config : Config
    folder : Path
        The run folder.
    key : str
        Names the run: a resumed run goes on under the same key.
    """

    name: ClassVar[str]
    """The key of ``[tracking]``, and of the package."""

    @abstractmethod
    def __init__(self, config: Config, folder: Path, key: str) -> None: ...

    @abstractmethod
    def log(self, server_round: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of a round, named as by :func:`scalars`."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """Log no more: the run is finished, or it was stopped and may be resumed."""


def open_trackers(config: Config, folder: Path, key: str) -> Iterator[Tracker]:
    """Open the loggers that ``[tracking]`` asks for, one after the other.

    Raises
    ------
    InputError
        If one is asked for whose package is not installed, or that cannot be opened.
    """
    for kind in TRACKERS:
        if not getattr(config.tracking, kind.name):
            continue
        try:
            yield kind(config, folder, key)
        except ImportError:
            remedy = f"its package is missing; pip install {kind.name}"
            raise InputError(f"tracking.{kind.name}", True, remedy) from None
        except Exception as error:  # whatever the package raises, of a missing login or a server that is away
            why = " ".join(str(error).split())[:300]
            remedy = f"cannot be opened ({why}); set it up, or to false"
            raise InputError(f"tracking.{kind.name}", True, remedy) from None


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Flatten a line of rounds.jsonl into named numbers, such as ``test/accuracy`` and ``bytes/uplink_bytes``."""
    metrics = dict(line["metrics"])
    groups = {
        "test": metrics,
        "validation": metrics.pop("validation", {}),
        "bytes": line["communication"],
        "seconds": line["seconds"],
    }
    flat = {f"{group}/{k}": v for group, values in groups.items() for k, v in values.items()}
    flat |= {
        "train/loss": line["train_loss"],
        "privacy/epsilon": line["epsilon"],
        "clients/failed": len(line["failed"]),
    }
    return {name: float(value) for name, value in flat.items() if isinstance(value, int | float)}


class _TensorBoard(Tracker):
    name = "tensorboard"

    def __init__(self, config: Config, folder: Path, key: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, server_round: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, server_round)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class _WeightsAndBiases(Tracker):
    name = "wandb"

    def __init__(self, config: Config, folder: Path, key: str) -> None:
        import wandb

        self._run = wandb.init(
            project=config.tracking.project,
            name=config.run.name,
            id=key,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            resume="allow",
            reinit="create_new",  # another run of this process goes on beside it
        )

    def log(self, server_round: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=server_round)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow(Tracker):
    name = "mlflow"

    def __init__(self, config: Config, folder: Path, key: str) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(config.tracking.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(config.tracking.project)
        known = self._client.search_runs([number], f"tags.`{_TAG}` = '{key}'")
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(number, tags={_TAG: key}, run_name=config.run.name).info.run_id
        for name, value in _keys(config.model_dump(mode="json", exclude_none=True)):
            self._client.log_param(self._id, name, value)

    def log(self, server_round: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._client.log_metric(self._id, name, value, step=server_round)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")


TRACKERS: tuple[type[Tracker], ...] = (_TensorBoard, _WeightsAndBiases, _MLflow)
_TAG = "fedlora.run"


def _keys(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of nested sections, as ``--set`` names them, and their values."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
