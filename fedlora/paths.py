"""Paths that a user gives: what lies there, or one line that says why nothing can."""

from __future__ import annotations

import stat
from pathlib import Path

from fedlora.errors import InputError


def find_path(name: str, field: str) -> Path | None:
    """Look a path up, with ``~`` as the home directory.

    Returns
    -------
    Path or None
        A file or folder that is there; None where nothing is.

    Raises
    ------
    InputError
        Named ``field``, if the system cannot look there (a name that is too long, a loop of links, no permission), or
        what lies there can only be read once or never ends: a device, a pipe or a socket.
    """
    path = beside(Path(), name, field)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise InputError(field, name, "is a link to a path that does not exist; fix the link") from None
        return None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(field, name, f"cannot be looked up ({why}); give another path") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        remedy = "is a device, a pipe or a socket; write its content to a file and give that"
        raise InputError(field, name, remedy)
    return path


def beside(folder: Path, name: str, field: str) -> Path:
    """Return a path relative to a folder, with ``~`` as the home directory.

    Raises
    ------
    InputError
        Named ``field``, if it begins with ``~`` and no such home is known.
    """
    try:
        return folder / Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(field, name, f"cannot be looked up ({error}); give another path") from None
