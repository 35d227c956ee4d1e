"""Find run folders and read their files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from fedlora.config import Config, read_config
from fedlora.csv_files import read_csv
from fedlora.errors import InputError
from fedlora.tasks import Task, get_task

_not_finite = BeforeValidator(lambda value: math.nan if value is None else value)
_no_bound = BeforeValidator(lambda value: math.inf if value is None else value)
"""A number that is not finite is null in JSON."""
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]

_SKIPPED = ("tuning", "report", "checkpoint", "adapter")
_DEPTH = 4


class _Content(BaseModel):
    """The fields that are read; files may have more."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Epsilon(_Content):
    """Privacy spent by the clients."""

    max: Annotated[float, Field(ge=0), _no_bound]
    mean: Annotated[float, Field(ge=0), _no_bound]
    delta: float
    accountant: str
    covers_init: bool


class Flower(_Content):
    """What Flower moved over the sockets of real nodes for ``message_bytes`` of messages."""

    sent_bytes: Count
    received_bytes: Count
    message_bytes: Count
    overhead: float


class Communication(_Content):
    """Bytes of all messages so far; ``flower`` of runs on real nodes alone."""

    initial_bytes: Count
    downlink_bytes: Count
    uplink_bytes: Count
    payload_bytes: Count
    formula_bytes: Count
    flower: Flower | None = None


class Environment(_Content):
    """Where a run ran."""

    python: str = ""
    platform: str = ""
    processor: str = ""
    gpu: str | None = None
    versions: dict[str, str | None] = {}
    command: str = ""
    commit: str | None = None


class Summary(_Content):
    """summary.json."""

    method: str
    seed: int
    rounds: Count
    clients: Count
    start: dict[str, Any] | None = None
    final: dict[str, Any]
    personalised: bool = False
    test_examples: Count | None = None
    trainable_parameters: Count
    epsilon: Epsilon | None
    communication: Communication
    seconds: dict[str, float]
    environment: Environment


class RoundLine(_Content):
    """A line of rounds.jsonl; ``metrics`` is empty in rounds without evaluation."""

    round: Count
    metrics: dict[str, Any]
    drift: float | None = None
    seconds: dict[str, float] = {}

    def score(self, name: str) -> float | None:
        """Return a metric, where this round has it as a number."""
        value = self.metrics.get(name)
        return float(value) if isinstance(value, int | float) else None


class MessageLine(_Content):
    """A line of communication.csv."""

    round: Count
    client: int
    direction: Annotated[str, Field(pattern="^(initial|(evaluate_)?(down|up))$")]
    payload_bytes: Count
    message_bytes: Count
    formula_bytes: Count


class PrivacyLine(_Content):
    """A line of privacy.csv: what a client had spent after a round that it took part in."""

    round: Count
    epsilon: Annotated[float, Field(ge=0), _no_bound] = math.inf


class LeftOutLine(_Content):
    """A line of left_out.csv: a client that a round asked and that does not count in it."""

    round: Count
    attempt: Count
    client: int
    code: Annotated[str, Field(pattern="^[a-z0-9_]+$")]


class Claimed(_Content):
    """What an audited run claims; ``epsilon`` is null without privacy."""

    epsilon: Annotated[float, Field(ge=0), _no_bound]
    delta: float


class LowerBound(_Content):
    """What an audit proves, and with which confidence."""

    epsilon: Annotated[float, Field(ge=0)]
    confidence: Share
    attack: str | None = None


class AuditFile(_Content):
    """audit.json, which ``fedlora audit --output`` wrote into the run's folder."""

    claimed: Claimed
    lower_bound: LowerBound
    canaries: Count
    unit: str = ""
    holds: bool = True


class ClientLine(_Content):
    """A line of clients.csv; it also has the metric by which the run's task compares clients."""

    client: Count
    examples: Count
    loss: float


class PartitionLine(_Content):
    """A line of partition.csv."""

    client: Count
    name: str
    label: str
    examples: Count


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes
    ----------
    name : str
        Its folder's name, with as many parent folders as make it unique.
    folder : Path
    config : Config
    summary : Summary
    scores : dict of str to float
        Metrics of the final model: those of its task, and the loss.
    start : dict of str to float
        Likewise, before the first round; empty where the run did not evaluate then.
    rounds : list of RoundLine
    messages : list of MessageLine
    clients, partition, privacy, left_out : list
        Empty where the run did not write them.
    audit : AuditFile, optional
    """

    name: str
    folder: Path
    config: Config
    summary: Summary
    scores: dict[str, float]
    start: dict[str, float]
    rounds: list[RoundLine]
    messages: list[MessageLine]
    clients: list[ClientLine]
    partition: list[PartitionLine]
    privacy: list[PrivacyLine]
    left_out: list[LeftOutLine] = field(default_factory=list)
    audit: AuditFile | None = None

    @property
    def task(self) -> Task:
        """The task of the run's model."""
        return get_task(self.config.model.task)


@dataclass(frozen=True)
class Unfinished:
    """A run that has no summary yet."""

    name: str
    folder: Path
    rounds_done: int
    rounds: int | None


@dataclass(frozen=True)
class Found:
    """The runs in the given folders."""

    runs: list[FinishedRun]
    unfinished: list[Unfinished]


def read_runs(folders: Sequence[str | Path]) -> Found:
    """Read every run in the given folders. Each is a run, a study, or a folder of these.

    Folders named tuning, report, checkpoint and adapter, and hidden ones, are not searched.

    Raises
    ------
    InputError
        If a folder is missing or holds no run, a run's files are damaged, or no run is finished.
    """
    paths: dict[Path, None] = {}
    for folder in folders:
        path = Path(folder)
        try:
            there = path.is_dir()
        except (OSError, ValueError):
            there = False
        if not there:
            raise InputError(
                "DIR", str(folder), "there is no such folder; give a run folder, a study, or a folder of runs"
            )
        try:
            found = dict.fromkeys(each.resolve() for each in _run_folders(path, _DEPTH))
        except OSError as error:
            remedy = f"cannot be searched ({error.strerror}: {error.filename}); give the folders of runs in it"
            raise InputError("DIR", str(folder), remedy) from None
        if not found:
            raise InputError("DIR", str(folder), "holds no run; give a run folder, a study, or a folder of runs")
        paths |= found
    names = _names(list(paths))
    runs: list[FinishedRun] = []
    unfinished: list[Unfinished] = []
    for path, name in names.items():
        if (path / "summary.json").is_file():
            runs.append(_read(path, name))
        else:
            unfinished.append(_unfinished(path, name))
    if not runs:
        first = unfinished[0]
        remedy = f"no run is finished; finish them first, for example {first.name} with fedlora run --resume"
        raise InputError("DIR", ", ".join(map(str, folders)), remedy)
    return Found(runs, unfinished)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder, finished or not."""
    return (folder / "config.toml").is_file() and not (folder / "study.toml").is_file()


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    if (folder / "study.toml").is_file():
        # A study folder also holds tuning runs, which are not compared.
        folder = folder / "runs"
    if depth == 0 or not folder.is_dir():
        return
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        if is_run(below) or (below.name not in _SKIPPED and not below.name.startswith(".")):
            yield from _run_folders(below, depth - 1)


def _names(paths: list[Path]) -> dict[Path, str]:
    """Name each folder by as many trailing path parts as make the names unique."""
    names = {}
    for path in paths:
        length = 1
        while length < len(path.parts) and any(
            other != path and other.parts[-length:] == path.parts[-length:] for other in paths
        ):
            length += 1
        names[path] = "/".join(path.parts[-length:])
    return names


def _unfinished(path: Path, name: str) -> Unfinished:
    lines = path / "rounds.jsonl"
    done = len(lines.read_bytes().splitlines()) if lines.is_file() else 0
    try:
        rounds = read_config(path / "config.toml").run.rounds
    except InputError:
        rounds = None
    return Unfinished(name, path, done, rounds)


def _read(path: Path, name: str) -> FinishedRun:
    try:
        config = read_config(path / "config.toml")
    except InputError as error:
        raise InputError("DIR", str(path), f"its config.toml cannot be used ({error})") from None
    summary = _parse(path, "summary.json", Summary.model_validate_json)
    lines = _parse(path, "rounds.jsonl", _json_lines)
    if summary.method != config.method.name or summary.seed != config.run.seed:
        raise _damaged(path, "summary.json", "its method or seed is not that of config.toml")
    task = get_task(config.model.task)
    if summary.personalised and not summary.final:
        remedy = "has models of its clients' own, which nobody scored; run it again with server.fraction_evaluate, or "
        raise InputError("DIR", str(path), f"{remedy}leave it out of the report")
    for metric in ("loss", task.primary):
        if metric not in summary.final:
            raise _damaged(path, "summary.json", f"final.{metric} is missing")
    scores, start = _scores(path, "final", summary.final, task), _scores(path, "start", summary.start or {}, task)
    optional: dict[str, Any] = {
        name: _parse(path, f"{name}.csv", _csv_reader(line)) if (path / f"{name}.csv").is_file() else []
        for name, line in (
            ("clients", _client_line(task)),
            ("partition", PartitionLine),
            ("privacy", PrivacyLine),
            ("left_out", LeftOutLine),
        )
    }
    messages = _parse(path, "communication.csv", _csv_reader(MessageLine))
    if (path / "audit.json").is_file():
        optional["audit"] = _parse(path, "audit.json", AuditFile.model_validate_json)
    return FinishedRun(name, path, config, summary, scores, start, lines, messages, **optional)


def _kind(task: Task, metric: str) -> Any:
    """Return the type that a metric's value is checked against."""
    return Share if task.form(metric) == "percent" else Annotated[float, _not_finite]


def _scores(path: Path, field: str, metrics: dict[str, Any], task: Task) -> dict[str, float]:
    scores: dict[str, float] = {}
    for metric in (*task.scores, "loss"):
        if metric in metrics:
            try:
                scores[metric] = TypeAdapter(_kind(task, metric)).validate_python(metrics[metric])
            except ValidationError as error:
                raise _damaged(path, "summary.json", f"{field}.{metric}: {error.errors()[0]['msg']}") from None
    return scores


def _client_line(task: Task) -> type[ClientLine]:
    if task.client_metric in ClientLine.model_fields:
        return ClientLine
    more: dict[str, Any] = {task.client_metric: (_kind(task, task.client_metric), ...)}
    return create_model("ClientLine", __base__=ClientLine, **more)


_T = TypeVar("_T")


def _parse(path: Path, file: str, parse: Callable[[str], _T]) -> _T:
    try:
        # Decoded from bytes, so that line breaks in cells stay as they are.
        return parse((path / file).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise _damaged(path, file, "it is missing") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(path, file, f"{where}: {first['msg']}" if where else first["msg"]) from None
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise _damaged(path, file, str(error)) from None


def _damaged(path: Path, file: str, why: str) -> InputError:
    remedy = f"its {file} cannot be used ({why}); delete the folder and run again, or leave it out of the report"
    return InputError("DIR", str(path), remedy)


def _json_lines(text: str) -> list[RoundLine]:
    return [RoundLine.model_validate(json.loads(line)) for line in text.splitlines()]


def _csv_reader(line: type[_Content]) -> Callable[[str], Any]:
    adapter: TypeAdapter[Any] = TypeAdapter(list[line])  # type: ignore[valid-type]

    def read(text: str) -> Any:
        # An empty cell is a missing value, except in columns of names.
        return adapter.validate_python(
            [{k: v for k, v in row.items() if v != "" or k in ("name", "label")} for row in read_csv(text)]
        )

    return read
