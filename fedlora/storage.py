"""Disks that are full, read-only or broken: one line that names the place, whoever raised it."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.errors import RunError

_REMEDY = "make room there, then give the same command again"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN = (*_FULL, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
_SQLITE = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}


class StorageError(RunError):
    """A folder cannot be written in the middle of the work.

    Parameters
    ----------
    place : str
        The file or folder.
    reason : str
        In the system's words.
    remedy : str
    """

    def __init__(self, place: str, reason: str, remedy: str = _REMEDY) -> None:
        self.place, self.reason, self.remedy = place, " ".join(reason.split()), remedy
        super().__init__(f"{place} cannot be written ({self.reason}); {remedy}")

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, str, str]]:
        return type(self), (self.place, self.reason, self.remedy)


def storage_error(error: BaseException) -> int | None:
    """Return the errno with which a disk failed, or None if the error is about something else.

    SQLite and safetensors have errors of their own for it, and numpy's and pyarrow's have no errno.
    """
    if isinstance(error, sqlite3.Error):
        return _SQLITE.get((getattr(error, "sqlite_errorcode", None) or 0) & 0xFF)
    found = error.errno if isinstance(error, OSError) else None
    if found is None and (isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
        told = re.search(r"\bos error (\d+)\b|\berrno (\d+)\b", str(error), re.IGNORECASE)
        if told is not None:
            found = int(told[1] or told[2])
        elif re.search(r"\d+ requested and \d+ written", str(error)):
            found = errno.ENOSPC
    return found if found in _BROKEN else None


def is_full(error: BaseException) -> bool:
    """Whether the disk, or the user's share of it, is full or broken, rather than closed to the user."""
    return storage_error(error) in (*_FULL, errno.EIO)


@contextmanager
def writes_to(folder: str | Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn the errors of a disk that fails under ``folder`` into :class:`StorageError`.

    An error that names a file elsewhere, such as one of the cache, is told of that file.
    """
    try:
        yield
    except Exception as error:
        found = storage_error(error)
        if found is None:
            raise
        named = getattr(error, "filename", None)
        place = str(folder)
        if isinstance(named, str) and not os.path.abspath(named).startswith(os.path.abspath(folder)):
            place = named
        raise StorageError(place, os.strerror(found), remedy) from error
