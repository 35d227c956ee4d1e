"""The study's folder: its file, its runs, and study.json with their status.

::

    study.toml       the study with its base config; runs again as it is
    study.json       every planned run with what it varies, its status and its forecast; what tuning chose and cost
    runs/NAME        run folders
    tuning/NAME      run folders of the tuning stage
    replaced/NAME    run folders of an earlier form of the study; a run that is planned again is taken from here
    errors/NAME.txt  traceback of a run that failed
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from fedlora.errors import InputError
from fedlora.results.folder import to_json, write_atomically
from fedlora.study.config import StudyConfig
from fedlora.study.plan import Plan, PlannedRun, folder_digest

Found = Literal["done", "started", "missing"]


class StudyFolder:
    """The folder of a study; only one process at a time may work in it.

    Parameters
    ----------
    path : Path

    Raises
    ------
    InputError
        If the folder holds something else, cannot be written, or is in use by another process.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_output(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError("--output", str(path), "another process is at this study; wait for it") from None
        except (OSError, ValueError) as error:
            remedy = f"cannot be made ({getattr(error, 'strerror', error)}); choose another folder"
            raise InputError("--output", str(path), remedy) from None

    def close(self) -> None:
        """Let others in."""
        self._lock.release()

    def begin(self, study: StudyConfig, planned: Iterable[PlannedRun]) -> None:
        """Write the study's file, and move run folders to match the plan. Nothing is deleted.

        Raises
        ------
        InputError
            If the folder cannot be written.
        """
        try:
            write_atomically(self.path / "study.toml", study.to_toml())
        except OSError as error:
            remedy = f"cannot be written ({error.strerror}); make it writable, or choose another folder"
            raise InputError("--output", str(self.path), remedy) from None
        wanted = {run.folder: run for run in planned}
        for kind in ("runs", "tuning"):
            for place in sorted((self.path / kind).glob("*/")):
                run = wanted.get(f"{kind}/{place.name}")
                # A run whose value is still to be tuned is checked once the value is known.
                if run is None:
                    self._set_aside(place)

    def find(self, run: PlannedRun) -> Found:
        """Return whether a run is done or started. Set a folder of another config aside; restore an earlier one."""
        place = self.path / run.folder
        if place.exists() and folder_digest(place) != run.digest:
            self._set_aside(place)
        if not place.exists():
            for old in sorted((self.path / "replaced").glob("*/")):
                if folder_digest(old) == run.digest:
                    place.parent.mkdir(exist_ok=True)
                    os.replace(old, place)
                    break
        if not place.exists():
            return "missing"
        return "done" if (place / "summary.json").exists() else "started"

    def read(self) -> dict[str, Any]:
        """Return study.json, or an empty dict."""
        return read_state(self.path)

    def write(self, state: Mapping[str, Any]) -> None:
        """Write study.json."""
        write_atomically(self.path / "study.json", to_json(state, indent=1) + "\n")

    def _set_aside(self, place: Path) -> None:
        set_aside(self.path, place)


def set_aside(study: Path, place: Path) -> None:
    """Move a run folder to replaced/."""
    (study / "replaced").mkdir(exist_ok=True)
    target, number = study / "replaced" / place.name, 2
    while target.exists():
        target, number = target.with_name(f"{place.name}-{number}"), number + 1
    shutil.move(place, target)


def check_output(path: Path) -> None:
    """Refuse a folder that holds anything but a study.

    Raises
    ------
    InputError
    """
    try:
        ours = path.is_dir() and ((path / "study.toml").exists() or {p.name for p in path.iterdir()} <= {".lock"})
        foreign = path.exists() and not ours
    except (OSError, ValueError) as error:
        remedy = f"cannot be read ({getattr(error, 'strerror', error)}); choose another folder"
        raise InputError("--output", str(path), remedy) from None
    if foreign:
        raise InputError("--output", str(path), "exists already and is no study's folder; choose another")


def read_state(path: Path) -> dict[str, Any]:
    """Return a study folder's study.json, or an empty dict if it cannot be read; it is then rewritten."""
    try:
        state = json.loads((path / "study.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def all_entries(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the study.json entries of all runs: the compared ones, then the tuning runs."""
    groups = (state.get("tuning") or {}).get("groups", [])
    return [*state.get("points", []), *(candidate for group in groups for candidate in group["candidates"])]


def is_unchanged(plan: Plan, run: PlannedRun, entry: Mapping[str, Any], folder: Path) -> bool:
    """Whether the run folder has the planned config, with the tuned value from its study.json ``entry``."""
    over = plan.study.tuning.over if plan.study.tuning else None
    if run in plan.runs and over is not None:
        if over not in entry["values"]:
            return False
        run = plan.chosen(plan.runs.index(run), entry["values"][over])
    return folder_digest(folder / run.folder) == run.digest
