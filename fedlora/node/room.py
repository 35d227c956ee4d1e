"""Limit the disk space that servers' runs take on a node, and keep some free for the ledger."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from fedlora.errors import InputError
from fedlora.node.config import NodeConfig

RESERVE = 200 * 10**6
"""Bytes that the cache leaves free, since ledger and logs may be on the same disk."""

OWN = "own"
"""Folder, in the node's directory, of the arrays that stay on the node: a file for each federation and sort."""

_OF_RUNS = ("tokens", "initial")
_DAY = 86400.0
# A token takes 4 bytes, and there are seldom more tokens than bytes of text.
_TOKENS_PER_BYTE = 4


def make_room(node: NodeConfig, needed: int = 0, used: tuple[Path, ...] = ()) -> None:
    """Delete files of runs, least recently used first, until there is room for more bytes.

    These are tokens, frozen arrays, and the arrays of :data:`OWN`.

    Parameters
    ----------
    node : NodeConfig
    needed : int
        Bytes about to be written.
    used : tuple of Path
        Paths that are in use; they are kept and count as used now.

    Raises
    ------
    InputError
        If ``needed`` exceeds ``policy.max_cache_gb``, or the disk is too full.
    """
    limit = round(node.policy.max_cache_gb * 1e9)
    if needed > limit:
        raise InputError("policy.max_cache_gb", node.policy.max_cache_gb, f"a run asks to keep {needed / 1e9:.3g} GB")
    try:
        node.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        tokens = _TOKENS_PER_BYTE * os.stat(node.data.path).st_size
        for path in used:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
        entries = sorted(_entries(node))
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total + needed <= limit and _free(node.cache) >= needed + tokens + RESERVE:
                return
            if path not in used:
                _remove(path)
                total -= size
        free = _free(node.cache)
    except OSError as error:
        raise InputError("state.cache", str(node.cache), f"cannot be written ({error.strerror})") from None
    if free < needed + tokens + RESERVE:
        remedy = f"{free / 1e9:.3g} GB are free there, too few for a run; free some, or give a folder on another disk"
        raise InputError("state.cache", str(node.cache), remedy)


def tidy(cache: Path) -> None:
    """Delete unfinished files of killed processes in the cache that are at least a day old."""
    for path in cache.glob("*/.*"):
        with contextlib.suppress(OSError):
            if path.is_dir() and time.time() - path.stat().st_mtime > _DAY:
                shutil.rmtree(path)


def _entries(node: NodeConfig) -> Iterator[tuple[float, int, Path]]:
    """Yield time of last use, bytes and path of each entry."""
    for folder in (*(node.cache / kind for kind in _OF_RUNS), node.directory / OWN):
        for path in folder.glob("*"):
            # Another node of the same machine may share the cache.
            with contextlib.suppress(FileNotFoundError):
                files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
                yield path.stat().st_mtime, sum(file.stat().st_size for file in files), path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free
