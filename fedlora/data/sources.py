"""Examples from an asset, the hub, a file or a folder, checked and brought into one shape."""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fedlora.assets import build_once, cache_dir, fetch, find_asset, is_asset
from fedlora.config import NODES, SERVER, Config
from fedlora.errors import InputError, LabelError

log = logging.getLogger("fedlora")

PARTITION_COLUMN = "partition"
"""Column of the examples that holds ``data.partition.column`` as it was given."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FORMATS = ".csv, .tsv, .jsonl, .json or .parquet, or a folder of datasets.save_to_disk"
_SUFFIXES = {".csv", ".tsv", ".jsonl", ".json", ".parquet"}
# One stream of random numbers for each use of the run's seed.
_HOLD_OUT, _SUBSET, _VALIDATION = 1, 2, 3


@dataclass
class Examples:
    """The examples of a run.

    Parameters
    ----------
    train, test : datasets.Dataset, optional
        None where they lie elsewhere (``data.name = "nodes"``, ``data.test = "server"``).
        Columns ``text`` or ``prompt`` and ``answer``; ``label`` (int64, an index into ``label_names``) for
        classification; ``domain`` if the source has such a column; ``partition`` if ``data.partition.column`` is set
        (in train only).
    validation, public : datasets.Dataset, optional
        Likewise.
    label_names : list of str, optional
        The classes; None for causal-lm.
    """

    train: datasets.Dataset | None
    test: datasets.Dataset | None
    validation: datasets.Dataset | None
    public: datasets.Dataset | None
    label_names: list[str] | None


def load_examples(config: Config) -> Examples:
    """Load the examples that ``data.*`` describes.

    Without ``data.test`` the source's split "test" is used, else a tenth of train is held out at random (not
    stratified). ``data.validation`` as a number holds that share of the rest out. With ``data.max_examples`` a random
    subset of the remaining training examples is kept, in the order of the source; ``data.max_test_examples`` does so
    for the test set. All follow ``data.seed`` alone, which is ``run.seed`` unless told. Rows without text are dropped.
    Classes are in the order of ``data.label_names``, of a ``ClassLabel``, or sorted (numbers by value).

    Parameters
    ----------
    config : Config
        Sections data, model (task) and run (seed) are used.

    Returns
    -------
    Examples

    Raises
    ------
    InputError
        If a source, split or column is not there, or the examples cannot be used as they are.
    """
    data = config.data
    if data.name == NODES:
        return _server_examples(config)
    if data.test == SERVER:
        return _own_examples(config)
    seed = _seed(config)
    splits = _load(data.name, "data.name", data.format)
    train_name = _train_split(config, splits)
    train = _shape(config, splits[train_name], "data.name", is_train=True)
    other = {name: _other(config, splits, name) for name in ("test", "validation", "public")}
    if data.test is None and "test" in splits and train_name != "test":
        other["test"] = _shape(config, splits["test"], "data.name")
    label_names = None
    if config.model.task == "sequence-classification":
        train, label_names = _encode_train(config, splits[train_name], train)
        for name, table in other.items():
            if table is not None:
                field = f"data.{name}" if getattr(data, name) else "data.name"
                other[name] = _encode(config, table, label_names, field)
    test = other["test"]
    if test is None:
        if len(train) < 2:
            raise InputError("data.name", data.name, "holds one example, too few to hold out a test set; add examples")
        train, test = _hold_out(train, max(1, len(train) // 10), [seed, _HOLD_OUT])
    if isinstance(data.validation, float):
        held = round(data.validation * len(train))
        if not 0 < held < len(train):
            remedy = (
                f"leaves {len(train) - held} of {len(train)} training examples and {held} to validate on; change it"
            )
            raise InputError("data.validation", data.validation, remedy)
        train, other["validation"] = _hold_out(train, held, [seed, _VALIDATION])
    if data.max_examples is not None and data.max_examples < len(train):
        order = np.random.default_rng([seed, _SUBSET]).permutation(len(train))
        train = train.select(np.sort(order[: data.max_examples]))
    return Examples(train, _subset_of_test(config, test), other["validation"], other["public"], label_names)


def _seed(config: Config) -> int:
    return config.run.seed if config.data.seed is None else config.data.seed


def _server_examples(config: Config) -> Examples:
    """Load what a server has when its clients are nodes: all but the training examples."""
    names = ("test", "validation", "public")
    tables = {name: _other(config, {}, name) for name in names}
    label_names = None
    if config.model.task == "sequence-classification":
        assert tables["test"] is not None
        label_names = config.data.label_names or _sorted_labels(config, tables["test"])
        _check_classes(config, label_names)
        for name, table in tables.items():
            if table is not None:
                tables[name] = _encode(config, table, label_names, f"data.{name}")
    return Examples(None, _subset_of_test(config, tables["test"]), tables["validation"], tables["public"], label_names)


# A node's own file. What it answers must not depend on its texts: every row counts, and every value is a text.


def count_own(config: Config) -> int:
    """Count the examples of a node's own file, once its columns and its labels fit the run; texts are not looked at.

    They are the rows of the file but those that are blank in all of several columns, whatever the run asks for.

    Raises
    ------
    InputError
        If the file cannot be read, a column is not there, or a row has no label.
    LabelError
        If a label is none of ``data.label_names``.

    Notes
    -----
    A file is read once, until it changes: how long an answer takes tells nothing of its size from the second on.
    """
    try:
        stat = Path(config.data.name).stat()
    except OSError as error:
        raise InputError("data.name", config.data.name, f"cannot be read ({error.strerror}); mend the file") from None
    same = config.data.model_copy(update={"label_names": None}).model_dump_json()
    key = (same, config.model.task, stat.st_size, stat.st_mtime_ns)
    if not _last_own or _last_own[0][0] != key:
        _last_own[:] = [(key, _raw_labels(config, _own_table(config)))]
    return len(_own_labels(config, _last_own[0][1]))


_last_own: list[tuple[tuple[Any, ...], list[Any]]] = []


def _own_examples(config: Config) -> Examples:
    table = _own_table(config)
    labels = _own_labels(config, _raw_labels(config, table))
    texts = {name: _any_texts(table, column) for name, column in _text_columns(config).items()}
    empty = sum(not all(text.strip() for text in row) for row in zip(*texts.values(), strict=True))
    if empty:
        log.warning("%d of %d rows have no text in %s", empty, len(labels), " and ".join(_text_columns(config)))
    if config.model.task == "causal-lm":
        return Examples(datasets.Dataset.from_dict(texts), None, None, None, None)
    train = datasets.Dataset.from_dict({**texts, "label": np.array(labels, np.int64)})
    return Examples(train, None, None, None, config.data.label_names)


def _own_table(config: Config) -> datasets.Dataset:
    """Read the file, without its blank rows."""
    data, texts = config.data, _text_columns(config)
    label = {} if config.model.task == "causal-lm" else {"label": data.label}
    used = {**texts, **label}
    table = _load_file(Path(data.name), "data.name", data.name, data.format, used.values(), texts.values())
    for name, column in used.items():
        _need(table, column, f"data.{name}")
    if len(table.column_names) == 1:
        return table
    blank = np.logical_and.reduce([np.asarray(column.is_null()) for column in table.data.columns])
    if blank.all():
        raise InputError("data.name", data.name, "holds no rows; give a file with examples")
    return table.select(np.flatnonzero(~blank)).flatten_indices() if blank.any() else table


def _raw_labels(config: Config, table: datasets.Dataset) -> list[Any]:
    return [None] * len(table) if config.model.task == "causal-lm" else _labels(table, config.data.label)


def _own_labels(config: Config, labels: list[Any]) -> list[Any]:
    """Return the number of each row's class; None for a language model."""
    if config.model.task == "causal-lm":
        return labels
    data = config.data
    for row, label in enumerate(labels, 1):
        if _is_missing(label):
            raise InputError("data.label", data.label, f"row {row} has no label; fill it in or remove the row")
    only = datasets.Dataset.from_dict({"label": labels})
    found: list[int] = _encode(config, only, list(data.label_names or ()), "data.name")["label"][:]
    return found


def _any_texts(table: datasets.Dataset, column: str) -> list[str]:
    """Return a column as texts, whatever it holds: what is missing is empty, and bytes that are no UTF-8 are marked."""
    values = table.data.column(column)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = values.cast(pa.large_binary())
    cells = values.to_pylist()
    return ["" if c is None else c.decode("utf-8", "replace") if isinstance(c, bytes) else str(c) for c in cells]


def _subset_of_test(config: Config, test: datasets.Dataset | None) -> datasets.Dataset | None:
    most = config.data.max_test_examples
    if test is None or most is None or most >= len(test):
        return test
    order = np.random.default_rng([_seed(config), _SUBSET, 1]).permutation(len(test))
    return test.select(np.sort(order[:most]))


def source_identity(config: Config) -> list[Any]:
    """Describe where the examples come from such that another description means other content; JSON can hold it.

    Files count with path, size and time of change, assets with their checksums, hub data with the fingerprint of what
    lies in the local cache.
    """
    data = config.data
    found = [] if data.name == NODES else [_identity(data.name, "data.name")]
    for field in ("test", "validation", "public"):
        given = getattr(data, field)
        if isinstance(given, str) and (is_asset(given) or Path(given).expanduser().exists()):
            found.append(_identity(given, f"data.{field}"))
    return found


def materialise(source: datasets.Dataset | Mapping[str, datasets.Dataset]) -> str:
    """Save examples that are in memory where every process can read them.

    Parameters
    ----------
    source : datasets.Dataset or Mapping[str, datasets.Dataset]
        One data set, or splits by name (a ``DatasetDict`` is one).

    Returns
    -------
    str
        A folder of the cache, named by the content, for use as ``data.name``.

    Raises
    ------
    InputError
        If it is something else.
    """
    splits = dict(source) if isinstance(source, Mapping) else {"train": source}
    if not splits or not all(isinstance(table, datasets.Dataset) for table in splits.values()):
        raise InputError("data", type(source).__name__, "give a datasets.Dataset, or a mapping of split names to such")
    digest = hashlib.sha256()
    for name, table in sorted(splits.items()):
        digest.update(f"{name}\n{table.features!r}\n".encode())
        content = table.with_format("arrow")[:].replace_schema_metadata(None).combine_chunks()
        with pa.ipc.new_stream(_HashSink(digest), content.schema) as writer:
            writer.write_table(content)
    folder = cache_dir() / "memory" / digest.hexdigest()[:32]

    def build(target: Path) -> None:
        with _quiet():
            datasets.DatasetDict(splits).save_to_disk(str(target))

    return str(build_once(folder, build, "data", type(source).__name__))


class _HashSink(io.RawIOBase):
    """A file that is only hashed."""

    def __init__(self, digest: Any) -> None:
        self.digest = digest

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return len(memoryview(content).cast("B"))


# Where examples come from.


def _load(name: str, field: str, file_format: str | None = None) -> dict[str, datasets.Dataset]:
    if is_asset(name):
        return _load_asset(name, field)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, field, name)
    if path.is_file():
        return {"train": _load_file(path, field, name, file_format)}
    if path.suffix.lower() in _SUFFIXES or not _HUB_ID.fullmatch(name):
        raise InputError(field, name, f"there is no such file or folder; give a path to {_FORMATS}")
    try:
        with _quiet():
            loaded = datasets.load_dataset(name)
    except Exception as error:  # whatever the hub client, a parser or a builder raises: the source cannot be used
        remedy = f"is no file here and the hub does not give it ({_first_line(error)}); give a path or asset:NAME"
        raise InputError(field, name, remedy) from error
    return {str(split): table for split, table in loaded.items()}


def _load_asset(name: str, field: str) -> dict[str, datasets.Dataset]:
    """Read a data asset.

    The five domains of 20newsgroups are comp, rec, sci, talk and misc+alt, by the first part of the group's name; soc
    goes with misc+alt.
    """
    folder = fetch(name, "data", field)
    asset = find_asset(name, "data", field)
    columns: dict[str, list[str]]
    if asset.name == "rotten-tomatoes":
        content = bz2.decompress((folder / asset.file(".bz2")).read_bytes()).decode("utf-8")
        rows = [row for row in csv.DictReader(io.StringIO(content)) if row["category"] != "plot"]
        names = {"text": "text", "label": "category", "movie": "movie_name"}
        columns = {new: [row[old] for row in rows] for new, old in names.items()}
        return {"train": datasets.Dataset.from_dict(columns)}
    splits = {}
    for split in ("train", "test"):
        # Orange's format: three lines of header, then one example a line; the first is empty.
        lines = (folder / asset.file(f"-{split}.tab")).read_text(encoding="utf-8").rstrip("\n").split("\n")[3:]
        cells = [line.split("\t", 1) for line in lines if line.strip()]
        columns = {"text": [text for _, text in cells], "label": [label for label, _ in cells]}
        if asset.name == "20newsgroups":
            columns["domain"] = [_domain(label) for label in columns["label"]]
        splits[split] = datasets.Dataset.from_dict(columns)
    return splits


def _domain(group: str) -> str:
    first = group.split(".")[0]
    return first if first in ("comp", "rec", "sci", "talk") else "misc+alt"


def _load_folder(path: Path, field: str, name: str) -> dict[str, datasets.Dataset]:
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the files of the folder may be damaged in any way
        remedy = f"is no readable datasets folder ({_first_line(error)}); give one of save_to_disk, or a file"
        raise InputError(field, name, remedy) from error
    if isinstance(loaded, datasets.Dataset):
        return {"train": loaded}
    return {str(split): table for split, table in loaded.items()}


def _load_file(
    path: Path,
    field: str,
    name: str,
    file_format: str | None = None,
    columns: Collection[str] = (),
    texts: Collection[str] = (),
) -> datasets.Dataset:
    """Read a file; of JSON only ``columns``, if any are named; values in the columns ``texts`` become texts."""
    readers: dict[str, Callable[[Path], datasets.Dataset]] = {
        ".csv": lambda file: _read_table(file, ",", texts),
        ".tsv": lambda file: _read_table(file, "\t", texts),
        ".jsonl": lambda file: _read_json(file, columns, texts),
        ".json": lambda file: _read_json(file, columns, texts),
        ".parquet": lambda file: datasets.Dataset(pq.read_table(file)),
    }
    reader = readers.get(f".{file_format}" if file_format else path.suffix.lower())
    if reader is None:
        raise InputError(field, name, f"has an unknown format; give {_FORMATS}")
    try:
        table = reader(path)
    except Exception as error:  # the file may be damaged in any way
        raise InputError(field, name, f"cannot be read ({_first_line(error)}); mend the file") from error
    if len(table) == 0:
        raise InputError(field, name, "holds no rows; give a file with examples")
    return table


def _read_table(path: Path, separator: str, texts: Collection[str] = ()) -> datasets.Dataset:
    # "NA" and "null" are words like any other; only an empty cell is missing.
    missing: dict[str, Any] = {"keep_default_na": False, "na_values": [""], "dtype": dict.fromkeys(texts, str)}
    with warnings.catch_warnings():
        # Rows with more cells than the header has: pandas would shift or cut them.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        frame = pd.read_csv(path, sep=separator, index_col=False, encoding="utf-8-sig", low_memory=False, **missing)
    return datasets.Dataset.from_pandas(frame, preserve_index=False)


def _read_json(path: Path, columns: Collection[str] = (), texts: Collection[str] = ()) -> datasets.Dataset:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every row must be an object of columns")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if columns:
        rows = [row for row in rows if len(names) == 1 or any(value is not None for value in row.values())]
        names = [name for name in names if name in columns] or names
    made = {name: [row.get(name) for row in rows] for name in names}
    return datasets.Dataset.from_dict(made | {name: list(map(_as_text, made[name])) for name in texts if name in made})


def _as_text(value: Any) -> str | None:
    """Return any JSON value as a text that can be written: JSON allows halves of characters."""
    return None if value is None else str(value).encode("utf-8", "replace").decode("utf-8")


def _identity(name: str, field: str) -> list[Any]:
    if is_asset(name):
        return ["asset", sorted(find_asset(name, "data", field).files.items())]
    path = Path(name).expanduser()
    if path.is_file():
        return ["file", str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("cache-"))
        stats = [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return ["folder", str(path.resolve()), stats]
    splits = _load(name, field)
    return ["hub", name, [[split, len(table), table._fingerprint] for split, table in splits.items()]]


# Splits.


def _hold_out(train: datasets.Dataset, held: int, seed: list[int]) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Draw ``held`` examples out of train; both parts stay in the order of the source."""
    order = np.random.default_rng(seed).permutation(len(train))
    out = train.select(np.sort(order[:held]))
    return train.select(np.sort(order[held:])), out.select_columns(
        [n for n in out.column_names if n != PARTITION_COLUMN]
    )


def _train_split(config: Config, splits: Mapping[str, datasets.Dataset]) -> str:
    wanted = config.data.train
    if wanted is None:
        if len(splits) == 1:
            return next(iter(splits))
        wanted = "train"
    if wanted not in splits:
        raise InputError("data.train", config.data.train, f"there is no split {wanted!r}; splits: {', '.join(splits)}")
    return wanted


def _other(config: Config, splits: Mapping[str, datasets.Dataset], name: str) -> datasets.Dataset | None:
    given = getattr(config.data, name)
    if not isinstance(given, str):
        return None  # not there, or a share of train
    field = f"data.{name}"
    if given in splits:
        return _shape(config, splits[given], field)
    if not is_asset(given) and not Path(given).expanduser().exists():
        if config.data.name == NODES:
            raise InputError(field, given, f"there is no such file on the server, in {Path.cwd()}; give its path there")
        raise InputError(field, given, f"is no split (splits: {', '.join(splits)}) and no file; give one of these")
    loaded = _load(given, field)
    table = loaded.get(name) or (next(iter(loaded.values())) if len(loaded) == 1 else None)
    if table is None:
        raise InputError(field, given, f"holds the splits {', '.join(loaded)}; give a source with one split")
    return _shape(config, table, field)


# Columns.


def _shape(config: Config, table: datasets.Dataset, field: str, is_train: bool = False) -> datasets.Dataset:
    """Pick the columns under their standard names, labels still raw; drop rows without text."""
    data, causal = config.data, config.model.task == "causal-lm"
    value = getattr(data, field.removeprefix("data."))
    texts = _text_columns(config)
    columns: dict[str, list[Any]] = {}
    for name, column in texts.items():
        _need(table, column, f"data.{name}")
        columns[name] = _texts(table, column, f"data.{name}")
    keep = np.array([all(text and text.strip() for text in row) for row in zip(*columns.values(), strict=True)], bool)
    if not keep.any():
        raise InputError(field, value, f"no row has a text in {' and '.join(map(repr, texts.values()))}; give examples")
    if not causal:
        _need(table, data.label, "data.label")
        columns["label"] = _labels(table, data.label)
        for row, label in enumerate(columns["label"]):
            if keep[row] and _is_missing(label):
                remedy = f"row {row + 1} of {value} has no label; fill it in or remove the row"
                raise InputError("data.label", data.label, remedy)
    if "domain" in table.column_names:
        domains = ("" if domain is None else str(domain) for domain in table["domain"][:])
        columns["domain"] = [domain if domain.strip() else "(none)" for domain in domains]
    skewed = data.partition.column
    if skewed is not None and is_train:
        _need(table, skewed, "data.partition.column")
        columns[PARTITION_COLUMN] = table[skewed][:]
    rows = np.flatnonzero(keep)
    kept = {name: [values[row] for row in rows] for name, values in columns.items()}
    return datasets.Dataset.from_dict(kept)


def _text_columns(config: Config) -> dict[str, str]:
    """Return the columns of the texts by their standard names."""
    data = config.data
    if config.model.task == "causal-lm" and data.prompt is not None and data.answer is not None:
        return {"prompt": data.prompt, "answer": data.answer}
    return {"text": data.text}


def _need(table: datasets.Dataset, column: str, field: str) -> None:
    if column not in table.column_names:
        raise InputError(field, column, f"there is no such column; columns: {', '.join(table.column_names)}")


def _texts(table: datasets.Dataset, column: str, field: str) -> list[str | None]:
    texts: list[Any] = table[column][:]
    wrong = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if wrong is not None and not all(text is None or text != text for text in texts):
        raise InputError(field, column, f"holds {type(wrong).__name__} values, not text; name the column of the texts")
    return [text if isinstance(text, str) else None for text in texts]


# Labels.


def _is_missing(label: Any) -> bool:
    return label is None or label != label or (isinstance(label, str) and not label.strip())


def _labels(table: datasets.Dataset, column: str) -> list[Any]:
    labels: list[Any] = table[column][:]
    feature = table.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        return labels
    # The hub marks a missing label with -1.
    return [None if label is None or label < 0 else feature.names[label] for label in labels]


def _encode_train(
    config: Config, source: datasets.Dataset, table: datasets.Dataset
) -> tuple[datasets.Dataset, list[str]]:
    feature = source.features[config.data.label]
    if config.data.label_names is not None:
        names = list(config.data.label_names)
    elif isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    else:
        names = _sorted_labels(config, table)
    _check_classes(config, names)
    return _encode(config, table, names, "data.name"), names


def _sorted_labels(config: Config, table: datasets.Dataset) -> list[str]:
    keys = {_label_key(config, label) for label in table["label"]}
    return [str(key) for key in sorted(keys, key=lambda key: (isinstance(key, str), key))]


def _check_classes(config: Config, names: list[str]) -> None:
    if len(names) < 2:
        remedy = f"has the one class {names[0]!r}; classification needs two or more"
        raise InputError("data.label", config.data.label, remedy)


def _encode(config: Config, table: datasets.Dataset, names: list[str], field: str) -> datasets.Dataset:
    index = {name: number for number, name in enumerate(names)}
    labels = [str(_label_key(config, label)) for label in table["label"]]
    unknown = next((label for label in labels if label not in index), None)
    if unknown is not None:
        where = "never occurs in train" if config.data.label_names is None else "is not in data.label_names"
        remedy = f"the label {unknown!r} {where} (labels there: {', '.join(names[:10])}); mend the labels"
        raise LabelError(field, getattr(config.data, field.removeprefix("data.")), remedy)
    columns = {name: table[name][:] for name in table.column_names if name != "label"}
    return datasets.Dataset.from_dict({**columns, "label": np.array([index[label] for label in labels], np.int64)})


def _label_key(config: Config, label: Any) -> str | int:
    """Return a label as a word or a whole number."""
    if isinstance(label, bool):
        return str(label)
    if isinstance(label, int):
        return label
    if isinstance(label, float) and math.isfinite(label) and label.is_integer():
        return int(label)
    if isinstance(label, str):
        return label.strip()
    remedy = f"holds {label!r}, which is no class; labels are words or whole numbers"
    raise InputError("data.label", config.data.label, remedy)


def _first_line(error: Exception) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
