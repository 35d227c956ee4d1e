"""Read study.json: how values were tuned, what tuning cost, and which runs failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fedlora.errors import InputError
from fedlora.reporting.comparison import axis_label


class _Content(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Point(_Content):
    """A planned run."""

    name: str
    status: str
    error: str | None = None


class Cost(_Content):
    """Cost of the tuning runs; bytes of all messages."""

    runs: int
    seconds: float
    bytes: int


class Candidate(_Content):
    """A value that was tried."""

    value: Any


class TunedGroup(_Content):
    """Runs that share a tuned value."""

    values: dict[str, Any]
    chosen: Any = None
    at_edge: bool = False
    covered_by_privacy: bool | None = None
    cost: Cost
    candidates: list[Candidate]

    @property
    def label(self) -> str:
        """Values that all runs of the group share."""
        return " · ".join(axis_label(key, value) for key, value in self.values.items())


class Tuning(_Content):
    """The tuning stage."""

    over: str
    seeds: list[int]
    validation: str | float | None = None
    cost: Cost
    groups: list[TunedGroup]


class Asked(_Content):
    """``[report]`` of the study: budgets and targets to answer for."""

    budgets: dict[str, list[float]] = {}
    targets: list[float] = []


class StudyState(_Content):
    """study.json."""

    name: str
    points: list[Point]
    tuning: Tuning | None = None
    report: Asked = Asked()


@dataclass(frozen=True)
class StudyResults:
    """A study's folder and what its study.json says."""

    folder: Path
    state: StudyState

    @property
    def failed(self) -> list[Point]:
        """Runs that failed."""
        return [point for point in self.state.points if point.status == "failed"]


def read_studies(folders: Sequence[str | Path]) -> list[StudyResults]:
    """Return the studies among folders.

    Raises
    ------
    InputError
        If a study.json cannot be read.
    """
    studies = []
    for folder in dict.fromkeys(Path(folder) for folder in folders):
        path = folder / "study.json"
        if not (folder / "study.toml").is_file() or not path.is_file():
            continue
        try:
            studies.append(StudyResults(folder, StudyState.model_validate_json(path.read_bytes())))
        except (OSError, ValidationError) as error:
            why = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
            remedy = f"its study.json cannot be used ({why}); run fedlora study again to write a new one"
            raise InputError("DIR", str(folder), remedy) from None
    return studies
