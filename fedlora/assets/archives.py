"""Unpack single members of wheels, of an archive in pieces, and of source distributions.

A member's content goes where the caller says; no name in an archive chooses a path. Memory stays at a block, however
large a member is.
"""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedlora.storage import storage_error

MOST_BYTES = 4 * 2**30  # of one unpacked file: an archive of a strange index may unpack to any size
_BLOCK = 2**20


class ArchiveError(Exception):
    """An archive does not hold what it should; the message says which part of it."""


def unpack(archive: Path, members: Mapping[str, Path]) -> dict[str, str]:
    """Write members of a wheel, a zip or a .tar.gz archive to files.

    Parameters
    ----------
    archive : Path
    members : Mapping[str, Path]
        Path inside the archive to the file to write.

    Returns
    -------
    dict of str to str
        SHA-256 of each member, in hexadecimal.

    Raises
    ------
    ArchiveError
        If the archive is damaged, or a member is missing, too large or no plain file.
    """
    with _damage_told():
        return _of_tar(archive, members) if archive.name.endswith(".tar.gz") else _of_zip(archive, members)


def join(wheels: Sequence[Path], name: str, target: Path) -> None:
    """Join the pieces ``NAME.001``, ``NAME.002`` and so on, of which each wheel holds one, to a file.

    Raises
    ------
    ArchiveError
        If a wheel is damaged, or does not hold its piece.
    """
    with target.open("wb") as whole:
        for number, wheel in enumerate(wheels, 1):
            wanted = f"{name}.{number:03d}"
            with _damage_told(), zipfile.ZipFile(wheel) as content:
                pieces = [info for info in content.infolist() if info.filename.rpartition("/")[2] == wanted]
                if len(pieces) != 1:
                    raise ArchiveError(f"is damaged ({wheel.name} holds {len(pieces)} files {wanted})")
                with content.open(pieces[0]) as piece:
                    _copy(piece, whole, wanted)


@contextmanager
def _damage_told() -> Iterator[None]:
    """Raise whatever a damaged archive does to the modules that read it as :class:`ArchiveError`."""
    try:
        yield
    except ArchiveError:
        raise
    except Exception as error:  # also OSError, UnicodeDecodeError and LZMAError
        if storage_error(error) is not None:  # the disk's fault, not the archive's
            raise
        raise ArchiveError(f"is damaged ({error})") from None


def _of_zip(archive: Path, members: Mapping[str, Path]) -> dict[str, str]:
    digests = {}
    with zipfile.ZipFile(archive) as content:
        for member, target in members.items():
            info = content.getinfo(member)
            if info.file_size > MOST_BYTES:
                raise ArchiveError(f"holds {member}, which is too large")
            with content.open(info) as source, target.open("wb") as copy:
                digests[member] = _copy(source, copy, member)
    return digests


def _of_tar(archive: Path, members: Mapping[str, Path]) -> dict[str, str]:
    digests: dict[str, str] = {}
    # As a stream: one pass over the file, and none beyond the last member.
    with tarfile.open(archive, "r|gz") as content:
        for info in content:
            if info.name not in members or info.name in digests:
                continue
            source = content.extractfile(info) if info.isreg() else None
            if source is None:
                raise ArchiveError(f"holds {info.name} as a link or a folder, not as a file")
            if info.size > MOST_BYTES:
                raise ArchiveError(f"holds {info.name}, which is too large")
            with members[info.name].open("wb") as copy:
                digests[info.name] = _copy(source, copy, info.name)
            if len(digests) == len(members):
                return digests
    raise ArchiveError(f"is damaged (there is no {next(name for name in members if name not in digests)})")


def _copy(source: IO[bytes], target: IO[bytes], name: str) -> str:
    digest, copied = hashlib.sha256(), 0
    while block := source.read(_BLOCK):
        copied += len(block)
        if copied > MOST_BYTES:
            raise ArchiveError(f"holds {name}, which is too large")
        digest.update(block)
        target.write(block)
    return digest.hexdigest()
