"""Submit a run to a server, follow it, and bring its folder back."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.config import load_config
from fedlora.deployment.control import RunState, Server, UnreachableError
from fedlora.deployment.download import copy_run, note_change
from fedlora.errors import INPUT_MARK, InputError, RunError, plain_text
from fedlora.results.finished import RunResult
from fedlora.results.folder import to_json, write_atomically
from fedlora.results.user_code import with_user_code
from fedlora.status import DOING
from fedlora.strategies.base import get_strategy
from fedlora.strategies.callbacks import Progress
from fedlora.timeline import Phase, phase

_LOOK_SECONDS = 1.0
_PATIENCE_SECONDS = 300.0
_LONGEST_REASON = 20_000  # characters of why a run failed
_FAILED = "ServerApp failed with exception: "
_WARNING = re.compile(r"\S+ \S+ (?:WARNING|ERROR) (.*)")


def run_on(
    name: str,
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    output: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Run a config on a server's nodes.

    The server writes the run folder into its own runs/NAME, as in simulation. When the run ends, the folder is copied
    here over the connection on which the run was submitted.

    Parameters
    ----------
    name : str
        ``[superlink.NAME]`` in Flower's config.toml.
    config, overrides
        As for :func:`fedlora.simulate`; paths in it are the server's.
    output : Path, optional
        The run folder here; runs/NAME by default. It must not exist, unless ``resume`` is set.
    resume : bool
        Go on with the run folder that the server has.
    progress : Progress, optional

    Returns
    -------
    RunResult

    Raises
    ------
    InputError
        If something that the user gave is wrong, here or on the server.
    RunError
        If the run failed, or the server did not answer for five minutes.
    """
    given = with_user_code(load_config(config, overrides), {})
    get_strategy(given.method.name)
    folder = output if output is not None else Path("runs") / given.run.name
    if os.path.lexists(folder) and not resume:
        raise InputError("--output", str(folder), "exists already; choose another folder, or continue with --resume")
    progress = progress or Progress()
    with Server.named(name) as server:
        known = server.files(given.run.name) is not None
        if known and not resume:
            remedy = f"the server has a run of this name; choose another run.name, or continue with --resume ({name})"
            raise InputError("run.name", given.run.name, remedy)
        if resume and not known:
            raise InputError("--resume", given.run.name, f"there is no such run on {name}; run without --resume")
        first, told = (len(server.lines(given.run.name, file)) for file in ("rounds.jsonl", "run.log"))
        number = server.start(given.to_toml(), resume=resume)
        progress.on_start(given.run.rounds, first, 0)
        try:
            with phase("server", f"server {name}") as here:
                state = _follow(server, number, given.run.name, first, told, progress, here)
        except KeyboardInterrupt:
            server.stop(number)
            raise RunError(f"stopped; continue with: run ... --on {name} --resume") from None
        copy_run(server, given.run.name, folder)
    return _result(state, folder, name, first)


def _follow(server: Server, number: int, name: str, shown: int, told: int, progress: Progress, here: Phase) -> RunState:
    """Show rounds, warnings and what the server does as it writes them, until the run ends."""
    last = time.monotonic()
    while True:
        try:
            # Read the state before the file, so that the file holds everything written before the end.
            state = server.run(number)
            for text in server.lines(name, "run.log")[told:]:
                told += 1
                if (warning := _WARNING.match(text)) is not None:
                    progress.on_note(plain_text(warning[1]))
            for line in server.lines(name, "rounds.jsonl")[shown:]:
                with _readable("rounds.jsonl"):
                    progress.on_round(json.loads(line))
                shown += 1
            here.detail = partial(plain_text, "".join(server.lines(name, DOING)[:1]))
            last = time.monotonic()
        except UnreachableError:
            if time.monotonic() - last > _PATIENCE_SECONDS:
                raise
        else:
            if state.status == "finished":
                return state
        time.sleep(_LOOK_SECONDS)


def _result(state: RunState, folder: Path, name: str, first: int) -> RunResult:
    if state.outcome == "completed":
        path = folder / "summary.json"
        with _readable("summary.json"):
            summary = json.loads(path.read_text(encoding="utf-8"))
            # A run that had already finished moved nothing.
            if first < summary["rounds"]:
                summary["communication"]["flower"] = _flowers_count(state, folder, first)
                write_atomically(path, to_json(summary, indent=2) + "\n")
                note_change(folder, path.name)
            return RunResult(folder, summary)
    told = plain_text(state.details.removeprefix(_FAILED), _LONGEST_REASON)
    why = " ".join(told.split()) or f"the server says: {plain_text(state.outcome or state.status)}"
    if why.startswith(INPUT_MARK):
        field, _, rest = why.removeprefix(INPUT_MARK).partition(" = ")
        raise _as_told(field, rest)
    # A run refused at its start leaves nothing behind: the same command can be repeated.
    remedy = f"; continue with: run ... --on {name} --resume" if (folder / "config.toml").exists() else ""
    raise RunError(f"{why.rstrip('.')}{remedy}")


def _flowers_count(state: RunState, folder: Path, first: int) -> dict[str, float]:
    """Bytes that Flower moved for the run's messages since it was submitted, and the overhead."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    before = lines[first - 1]["communication"] if first else {}
    messages = sum(
        lines[-1]["communication"].get(f"{way}_bytes", 0) - before.get(f"{way}_bytes", 0)
        for way in ("initial", "downlink", "uplink", "evaluation")
    )
    moved = state.sent_bytes + state.received_bytes
    return {
        "sent_bytes": state.sent_bytes,
        "received_bytes": state.received_bytes,
        "message_bytes": messages,
        "overhead": moved / messages - 1 if messages else 0.0,
    }


@contextmanager
def _readable(file: str) -> Iterator[None]:
    """Raise one line for a server file with unexpected content."""
    try:
        yield
    except InputError:
        raise
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise RunError(
            f"the server's {file} cannot be read ({type(error).__name__}); it holds unexpected data"
        ) from None


def _as_told(field: str, rest: str) -> InputError:
    """An InputError raised on the server, with its text unchanged."""
    error = InputError(field, None, rest)
    error.args = (f"{field} = {rest}",)
    return error
