"""Write a report without overwriting the user's files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedlora.errors import InputError
from fedlora.storage import is_full

MANIFEST = "report/files.json"
"""Lists the files of an earlier report with their SHA-256. Only these are replaced."""


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a folder, in place of an earlier report's.

    Parameters
    ----------
    folder : Path
    files : mapping of str to bytes
        By path below the folder.

    Raises
    ------
    InputError
        If a file exists that no earlier report wrote, or that was changed since. Then nothing is written.
    """
    try:
        earlier = _earlier(folder)
        for name in files:
            path = folder / name
            if path.is_symlink() or (path.exists() and _sha256(path) not in earlier.get(name, [])):
                remedy = f"{name} exists and was not written by an earlier report; move it, or choose another --output"
                raise InputError("--output", str(folder), remedy)
        new = {name: [hashlib.sha256(content).hexdigest()] for name, content in files.items()}
        # Until all files are written the list holds old and new digests, so that an interrupted report can be repeated.
        both = {name: earlier.get(name, []) + new.get(name, []) for name in earlier | new}
        _replace(folder / MANIFEST, json.dumps(both).encode())
        for name, content in files.items():
            _replace(folder / name, content)
        for name in earlier.keys() - files.keys():
            path = folder / name
            if path.is_file() and not path.is_symlink() and _sha256(path) in earlier[name]:
                path.unlink()
                _remove_empty(path.parent, folder)
        _replace(folder / MANIFEST, json.dumps(new, indent=1).encode())
    except (OSError, ValueError) as error:
        if isinstance(error, InputError) or is_full(error):
            raise
        remedy = f"cannot be written ({getattr(error, 'strerror', None) or error}); choose another --output"
        raise InputError("--output", str(folder), remedy) from None


def _remove_empty(path: Path, above: Path) -> None:
    """Remove a folder and those that hold nothing but it, below ``above``."""
    while path != above and not any(path.iterdir()):
        path.rmdir()
        path = path.parent


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _earlier(folder: Path) -> dict[str, list[str]]:
    """Return the files of an earlier report: path to the digests it may have."""
    if (folder / "report" / "config.toml").exists():
        raise InputError(
            "--output", str(folder), "has a run named report, where tables would go; choose another --output"
        )
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        content = TypeAdapter(dict[str, list[str]]).validate_json(path.read_bytes())
    except ValidationError:
        remedy = f"{MANIFEST} is not what an earlier report wrote; move it, or choose another --output"
        raise InputError("--output", str(folder), remedy) from None
    # No report writes outside its folder.
    return {name: known for name, known in content.items() if not {"..", "/"} & set(Path(name).parts)}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
