"""Submit a run to a server, follow it, and bring its folder back."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedlora.config import Config, load_config
from fedlora.deployment.control import RunState, Server, UnreachableError
from fedlora.errors import INPUT_MARK, InputError, RunError
from fedlora.results.folder import RunResult, write_atomically
from strategies import get_strategy
from strategies.federation import Progress

_LOOK_SECONDS = 1.0
_PATIENCE_SECONDS = 300.0
_FAILED = "ServerApp failed with exception: "


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

    The server writes the run folder as in simulation, into its own runs/NAME; its files come here when the run ends,
    whole, over the same connection that the run was submitted on.

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
        If the run failed, or the server went away for longer than five minutes.
    """
    given = load_config(config, overrides)
    get_strategy(given.method.name)
    folder = output if output is not None else Path("runs") / given.run.name
    if folder.exists() and not resume:
        raise InputError("--output", str(folder), "exists already; choose another folder, or go on with --resume")
    progress = progress or Progress()
    with Server.named(name) as server:
        there = server.files(given.run.name)
        if there is not None and not resume:
            remedy = f"the server has a run of this name; choose another run.name, or go on with --resume ({name})"
            raise InputError("run.name", given.run.name, remedy)
        if there is None and resume:
            raise InputError("--resume", given.run.name, f"there is no such run on {name}; run without --resume")
        number = server.start(given.to_toml(), resume=resume)
        try:
            state, first = _follow(server, number, given, progress)
        except KeyboardInterrupt:
            server.stop(number)
            raise RunError(f"stopped; go on with: run ... --on {name} --resume") from None
        _bring(server, given.run.name, folder)
    return _result(state, folder, name, first)


def _follow(server: Server, number: int, config: Config, progress: Progress) -> tuple[RunState, int]:
    """Show the rounds as the server writes them until the run has ended; return its end, and the rounds it began with."""
    first: int | None = None
    shown = 0
    last = time.monotonic()
    with TemporaryDirectory() as temporary:
        while True:
            try:
                # The state first: what was written before the end is then in the file.
                state = server.run(number)
                lines = _rounds(server, config.run.name, Path(temporary) / "rounds.jsonl")
                last = time.monotonic()
            except UnreachableError:
                if time.monotonic() - last > _PATIENCE_SECONDS:
                    raise
                time.sleep(_LOOK_SECONDS)
                continue
            if first is None and lines is not None and state.status in ("running", "finished"):
                first = shown = len(lines) if state.status == "running" else 0
                progress.on_start(config.run.rounds, first, 0)
            for line in (lines or [])[shown:]:
                progress.on_round(line)
            shown = len(lines or [])
            if state.status == "finished":
                return state, first or 0
            time.sleep(_LOOK_SECONDS)


def _rounds(server: Server, name: str, copy: Path) -> list[dict[str, Any]] | None:
    files = server.files(name)
    if files is None:
        return None
    if "rounds.jsonl" not in files:
        return []
    server.fetch(name, "rounds.jsonl", copy)
    lines = copy.read_text(encoding="utf-8").split("\n")
    # What follows the last line break is on its way to the disk.
    return [json.loads(line) for line in lines[:-1]]


def _bring(server: Server, name: str, folder: Path) -> None:
    """Copy the run folder; summary.json comes last, so that a folder with it is whole."""
    files = server.files(name) or {}
    for file in sorted(files, key=lambda file: (file == "summary.json", file)):
        server.fetch(name, file, folder / file)


def _result(state: RunState, folder: Path, name: str, first: int) -> RunResult:
    if state.outcome == "completed":
        path = folder / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8"))
        summary["communication"]["flower"] = _flowers_count(state, folder, first)
        write_atomically(path, json.dumps(summary, indent=2) + "\n")
        return RunResult(folder, summary)
    why = " ".join(state.details.removeprefix(_FAILED).split()) or f"the server says: {state.outcome or state.status}"
    if why.startswith(INPUT_MARK):
        field, _, rest = why.removeprefix(INPUT_MARK).partition(" = ")
        raise _as_told(field, rest)
    raise RunError(f"{why}; go on with: run ... --on {name} --resume")


def _flowers_count(state: RunState, folder: Path, first: int) -> dict[str, float]:
    """What Flower says that it moved since the run was submitted, and how much that is above the messages' own bytes."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    before = lines[first - 1]["communication"] if first else {}
    messages = sum(
        lines[-1]["communication"][f"{way}_bytes"] - before.get(f"{way}_bytes", 0)
        for way in ("initial", "downlink", "uplink")
    )
    moved = state.sent_bytes + state.received_bytes
    return {
        "sent_bytes": state.sent_bytes,
        "received_bytes": state.received_bytes,
        "overhead": moved / messages - 1 if messages else 0.0,
    }


def _as_told(field: str, rest: str) -> InputError:
    """An InputError of the server's, with its own words."""
    error = InputError(field, None, rest)
    error.args = (f"{field} = {rest}",)
    return error
