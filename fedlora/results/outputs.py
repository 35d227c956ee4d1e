"""Digests of a finished run's output: its model and its summary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedlora.errors import InputError

SUMS = "SHA256SUMS"
"""Digests of the model's files, in the format of ``sha256sum --check``."""


def find_outputs(folder: Path, parts: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of every file of a run's result, and of its summary, by path in the run folder.

    Parameters
    ----------
    folder : Path
    parts : iterable of str
        The folders of the result: :attr:`fedlora.methods.Method.outputs`.
    """
    files = [file for name in sorted(parts) for file in sorted((folder / name).rglob("*")) if file.is_file()]
    files += [file for file in [folder / "summary.json"] if file.is_file()]
    return dict(zip([file.relative_to(folder).as_posix() for file in files], _digests(files), strict=True))


def write_sums(folder: Path, outputs: Mapping[str, str]) -> None:
    """Write :data:`SUMS`, without the summary, which other programs may extend."""
    lines = [f"{digest}  {name}\n" for name, digest in outputs.items() if "/" in name]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_outputs(folder: Path, outputs: Mapping[str, str]) -> list[str]:
    """Compare a finished run's output with its digests; return the names of missing files.

    Raises
    ------
    InputError
        If a file was changed.
    """
    there = [name for name in outputs if (folder / name).is_file()]
    for name, found in zip(there, _digests([folder / name for name in there]), strict=True):
        if found != outputs[name]:
            remedy = "is not as the run wrote it; delete it (or move it away), and --resume writes it again"
            raise InputError("--resume", str(folder / name), remedy)
    return [name for name in outputs if name not in there]


def check_sums(folder: Path, part: str) -> None:
    """Compare the files under ``part`` of a run folder with :data:`SUMS`, where there is one.

    Raises
    ------
    ValueError
        Naming the first file that is missing or changed.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name.startswith(f"{part}/")}
    for name in sums:
        if not (folder / name).is_file():
            raise ValueError(f"{name} is gone")
    for name, found in zip(sums, _digests([folder / name for name in sums]), strict=True):
        if found != sums[name]:
            raise ValueError(f"{name} is not as the run wrote it")


def _digests(files: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_digest, files))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
