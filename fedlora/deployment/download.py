"""Copy a run folder from an untrusted server: only files inside the folder, and all of them or none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from fedlora.deployment.control import Server
from fedlora.errors import InputError, RunError
from fedlora.node.names import is_device

MOST_FILES = 10_000
MOST_BYTES_A_FILE = 32 * 2**30
MOST_BYTES = 128 * 2**30
"""Limits on the files of one run."""

MANIFEST = ".copied.json"
"""Lists the SHA-256 of each copied file, by name. On resume only these files are replaced."""

_LONGEST_NAME, _LONGEST_PATH = 255, 1000  # bytes, characters


def copy_run(server: Server, name: str, folder: Path) -> None:
    """Copy a run's folder from the server.

    The files are copied into a temporary folder beside the target, which is renamed once it is complete. If the target
    exists (on resume), files are moved one by one, summary.json last, so that a folder with summary.json is complete.

    Parameters
    ----------
    server : Server
    name : str
        The run's name there.
    folder : Path
        Not created if the server has no files of the run.

    Raises
    ------
    InputError
        If the folder cannot be written, has no room, or has a file or link that no earlier copy wrote.
    RunError
        If the server lists a name outside the folder, lists too much, or sends something else than it listed.
    """
    files = server.files(name)
    if not files:
        return
    check_files(files, server.address)
    folder = Path(os.path.realpath(folder))
    try:
        known = _known(folder)
        for file in files:
            _check_free(folder, file, known)
        folder.parent.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(folder.parent).free
        if sum(files.values()) > room:
            remedy = f"has {room:,} bytes of room, the run needs {sum(files.values()):,}; choose another --output"
            raise InputError("--output", str(folder), remedy)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            content = Path(temporary) / "content"
            content.mkdir()
            come = [file for file, size in sorted(files.items()) if server.fetch(name, file, content / file, size)]
            new = {file: [_sha256(content / file)] for file in come}
            if not folder.exists():
                _write_manifest(content, new)
                os.rename(content, folder)
                return
            # Until all files are moved the list holds old and new digests, so that an interrupted copy can be repeated.
            _write_manifest(folder, {f: known.get(f, []) + new.get(f, []) for f in known | new})
            for file in sorted(come, key=lambda file: (file == "summary.json", file)):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(content / file, folder / file)
            _write_manifest(folder, known | new)
    except OSError as error:
        remedy = "choose another --output and add --resume: the server keeps the run"
        raise InputError("--output", str(folder), f"cannot be written ({error.strerror}); {remedy}") from None


def note_change(folder: Path, file: str) -> None:
    """Record the digest of a copied file that was just changed here."""
    known = _known(folder)
    _write_manifest(folder, {**known, file: [_sha256(folder / file)]})


def check_files(files: Mapping[str, int], address: str) -> None:
    """Check the list of files before any is written.

    Raises
    ------
    RunError
        If a name is outside the folder or two names are the same on some system, or if there are too many or too large.
    """

    def refuse(file: str, why: str) -> RunError:
        return RunError(f"{address} lists a file that is not copied, nor is any other: {ascii(file)[:120]} {why}")

    if len(files) > MOST_FILES:
        raise RunError(f"{address} lists {len(files)} files, more than {MOST_FILES}: none is copied")
    folded: dict[str, str] = {}  # every file and folder by its name without case, for systems that ignore case
    for file, size in files.items():
        why = _unsafe(file)
        if why is not None:
            raise refuse(file, why)
        if size > MOST_BYTES_A_FILE:
            raise refuse(file, f"is larger than {MOST_BYTES_A_FILE // 2**30} GiB")
        for path in (file, *map(str, PurePosixPath(file).parents)):
            if folded.setdefault(unicodedata.normalize("NFC", path).casefold(), path) != path:
                raise refuse(file, "differs from another name only in case")
    parents = {str(parent) for file in files for parent in PurePosixPath(file).parents}
    for file in files:
        if file in parents:
            raise refuse(file, "is a file and a folder")
    if sum(files.values()) > MOST_BYTES:
        raise RunError(f"{address} lists more than {MOST_BYTES // 2**30} GiB: nothing is copied")


def _unsafe(file: str) -> str | None:
    """Return why a name must not be written below a folder; None if it is safe on every system."""
    parts = file.split("/")
    if len(file) > _LONGEST_PATH or any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME for part in parts):
        return "is too long"
    if not file.isprintable() or "\\" in file or ":" in file:
        return "has characters that no file of a run has"
    if any(part in ("", ".", "..") for part in parts):
        return "is not inside the folder"
    if any(part.startswith(".") or part.endswith((".", " ")) or is_device(part) for part in parts):
        return "is hidden, or has another meaning on some systems"
    return None


def _check_free(folder: Path, file: str, known: Mapping[str, list[str]]) -> None:
    """Refuse to replace a link, a folder, or a file that no earlier copy wrote."""
    path = folder
    for part in PurePosixPath(file).parts[:-1]:
        path /= part
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise InputError("--output", str(folder), f"{path} is in the way; move it, or choose another --output")
    path = folder / file
    if path.is_symlink() or (path.exists() and (not path.is_file() or _sha256(path) not in known.get(file, []))):
        remedy = f"{file} exists, and differs from what the server sent before; move it, or choose another --output"
        raise InputError("--output", str(folder), remedy)


def _known(folder: Path) -> dict[str, list[str]]:
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(file): [str(digest) for digest in digests] for file, digests in content.items()}
    except (ValueError, TypeError, AttributeError):
        remedy = f"its {MANIFEST} is damaged; move the folder, or choose another --output"
        raise InputError("--output", str(folder), remedy) from None


def _write_manifest(folder: Path, digests: Mapping[str, list[str]]) -> None:
    temporary = folder / f"{MANIFEST}.{os.getpid()}"
    temporary.write_text(json.dumps(digests), encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
