"""Examples from an asset, the hub, a file or a folder, checked and brought into one shape."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.assets import build_once, cache_dir, is_asset
from fedlora.config import NODES, SERVER, Config
from fedlora.data.columns import (
    alike_classes,
    cells,
    check_column,
    listed,
    not_messages,
    read_choices,
    read_column,
    read_messages,
    read_owners,
    read_texts,
    read_words,
)
from fedlora.data.files import SUFFIXES, Table, without_format
from fedlora.data.origins import identity, load_file, load_headers, load_tables, quiet
from fedlora.errors import InputError, LabelError
from fedlora.paths import find_path
from fedlora.tasks import get_task
from fedlora.tasks.chat import answer_of, conversation
from fedlora.tasks.labels import INTEGER, is_missing

if TYPE_CHECKING:
    import datasets  # for real where it is used, as in files.py

log = logging.getLogger("fedlora")

PARTITION_COLUMN = "partition"
"""Column of the examples that holds ``data.partition.column`` as it was given."""
UNIT_COLUMN = "unit"
"""Column of the training examples that says whose each is, by ``privacy.unit``: numbers from 0."""
PLACE = "place"
"""Column of conversations that says where each is from, for errors."""

# One stream of random numbers for each use of the run's seed.
_HOLD_OUT, _SUBSET, _VALIDATION, _CLIENT_TEST, QUESTIONS, _PUBLIC = 1, 2, 3, 4, 5, 6


@dataclass
class Examples:
    """The examples of a run.

    Parameters
    ----------
    train, test : datasets.Dataset, optional
        None where they lie elsewhere (``data.name = "nodes"``, ``data.test = "server"``).
        Columns by the keys that the task reads, such as ``text``, ``text_pair``, or ``prompt`` and ``answer``;
        ``messages`` and ``place`` if they go through a chat template; ``choices`` to choose an answer from;
        ``label`` as the task's numbers (for a class int64, an index into ``label_names``); ``domain`` if the source has
        such a column; ``partition`` if ``data.partition.column`` is set, and ``unit`` if ``privacy.unit`` is (in train
        only).
    validation, public : datasets.Dataset, optional
        Likewise.
    label_names : list of str, optional
        The classes; None for tasks without classes.
    notes : list of str
        What was read otherwise than one might think.
    """

    train: datasets.Dataset | None
    test: datasets.Dataset | None
    validation: datasets.Dataset | None
    public: datasets.Dataset | None
    label_names: list[str] | None
    notes: list[str] = field(default_factory=list)


def load_examples(config: Config) -> Examples:
    """Load the examples that ``data.*`` describes.

    Without ``data.test`` the source's split "test" is used, else a tenth of train is held out at random (not
    stratified). ``data.validation`` as a number holds that share of the rest out, and ``data.public`` that of what is
    left then. With ``privacy.unit`` persons are held out, with all their examples: as many as it takes to reach that
    number of examples. With ``data.max_examples`` a random subset of the remaining training examples is kept, in the
    order of the source; ``data.max_test_examples`` does so for the test set. All follow ``data.seed`` alone, which is
    ``run.seed`` by default. Rows without text are dropped. Classes are in the order of ``data.label_names``, of a
    ``ClassLabel``, or sorted (numbers by value).

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
    seed = draw_seed(config)
    notes: list[str] = []
    sources = _sources(config)
    train = _shape(config, *sources["train"], notes, is_train=True)
    other = _shape_others(config, sources, notes)
    label_names, task = None, get_task(config.model.task)
    if task.classes:
        train, label_names = _encode_train(config, sources["train"][0], train)
        notes += alike_classes(config, label_names)
        other = {name: _encode(config, table, label_names, sources[name][1]) for name, table in other.items()}
    test = other.get("test")
    if test is None:
        if len(train) < 2:
            raise InputError("data.name", data.name, "holds one example, too few to hold out a test set; add examples")
        train, test = _hold_out(config, train, max(1, len(train) // 10), [seed, _HOLD_OUT])
    for key, stream, use in (("validation", _VALIDATION, "to validate on"), ("public", _PUBLIC, "for the server")):
        share = getattr(data, key)
        if isinstance(share, float):
            held = round(share * len(train))
            if not 0 < held < len(train):
                remedy = f"leaves {len(train) - held} of {len(train)} training examples and {held} {use}; change it"
                raise InputError(f"data.{key}", share, remedy)
            train, other[key] = _hold_out(config, train, held, [seed, stream])
    if data.max_examples is not None and data.max_examples < len(train):
        order = np.random.default_rng([seed, _SUBSET]).permutation(len(train))
        train = train.select(np.sort(order[: data.max_examples]))
    test = _subset_of_test(config, test)
    return Examples(train, test, other.get("validation"), other.get("public"), label_names, list(dict.fromkeys(notes)))


def check_sources(config: Config) -> None:
    """Check that the sources, splits and columns which ``data.*`` names are there, without loading any examples.

    Headers of files tell it within milliseconds. What is on the hub is left to :func:`load_examples`, and so
    is all that depends on rows.

    Raises
    ------
    InputError
        Naming the key of what is not there.
    """
    for part, (table, named) in _sources(config, header=True).items():
        where = "" if named == "data.name" else f" in {getattr(config.data, part)}"
        for key, column in _columns_of(config, part).items():
            check_column(table, column, key, where)


def draw_seed(config: Config) -> int:
    """Return the seed by which examples are held out and chosen."""
    return config.run.seed if config.data.seed is None else config.data.seed


def hold_out_of_client(
    config: Config, client: int, rows: np.ndarray, units: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Divide one client's rows into those that it trains on and those that it tests on, by ``data.client_test``.

    The draw depends on ``data.seed`` and the client alone. On a node the seed is fixed, so that no run trains on
    examples that another run tests on. A client with one example trains on it. With ``units``, whose each row is,
    persons are held out; a client with one person trains on it.

    Returns
    -------
    (ndarray, ndarray)
        Both in the order of the rows.
    """
    held, seed = held_out(config, len(rows)), 0 if config.data.test == SERVER else draw_seed(config)
    chosen = _drawn(len(rows), held, [seed, _CLIENT_TEST, client], units)
    return (rows, rows[:0]) if chosen.all() else (rows[~chosen], rows[chosen])


def held_out(config: Config, examples: int) -> int:
    """Return how many of its training examples a client holds out to test on; 0 if it tests on a file of its own."""
    share = config.data.client_test
    return min(max(1, round(share * examples)), examples - 1) if isinstance(share, float) and examples else 0


def _server_examples(config: Config) -> Examples:
    """Load what a server has when its clients are nodes: all but the training examples."""
    notes = list[str]()
    tables = _shape_others(config, _sources(config), notes)
    names = None
    if get_task(config.model.task).classes:
        names = config.data.label_names or _sorted_labels(config, tables["test"])
        _check_classes(config, names)
        notes += alike_classes(config, names)
        tables = {part: _encode(config, table, names, f"data.{part}") for part, table in tables.items()}
    test = _subset_of_test(config, tables["test"])
    return Examples(None, test, tables.get("validation"), tables.get("public"), names, list(dict.fromkeys(notes)))


# A node's own file. What it answers must not depend on its texts: every row counts, and every value is a text.


def count_own(config: Config) -> int:
    """Count the training examples of a node, once columns and labels fit the run; texts are not looked at.

    These are the rows of the file, without those that are blank in all of several columns, whatever the run asks for,
    and without those that the node tests on; or the persons that they are of, where steps draw persons. A file of test
    examples must fit the run as well.

    Raises
    ------
    InputError
        If the file cannot be read, a column is not there, or a row has no label or no person.
    LabelError
        If a label is none of ``data.label_names``.

    Notes
    -----
    A file is read once, until it changes: how long an answer takes tells nothing of its size from the second on.
    """
    try:
        stat = Path(config.data.name).stat()
    except OSError as error:
        raise InputError("data.name", config.data.name, f"cannot be read ({error.strerror}); fix the file") from None
    same = config.data.model_copy(update={"label_names": None}).model_dump_json()
    key = (same, config.model.task, config.privacy.unit, stat.st_size, stat.st_mtime_ns)
    if _last_own.get(config.data.name, (None, []))[0] != key:
        while len(_last_own) >= _MOST_OWN:
            del _last_own[next(iter(_last_own))]
        table, rows = _own_rows(config)
        _last_own[config.data.name] = key, _own_labels(config, table, rows), _own_units(config, table, rows)
    _, labels, units = _last_own[config.data.name]
    if get_task(config.model.task).classes:
        _own_classes(config, labels)
    tests = _own_tests(config)
    if tests is not None:
        count_own(tests)
    if units is None:
        return len(labels) - held_out(config, len(labels))
    sizes = _own_sizes(config, units)
    if config.privacy.samples_units:
        return len(sizes)
    most = config.privacy.group_cap
    return int((sizes if most is None else np.minimum(most, sizes)).sum())


def count_own_units(config: Config) -> int | None:
    """Count the persons that a node trains on, where steps draw single examples of them; after :func:`count_own`."""
    units = _last_own[config.data.name][2]
    return None if units is None or config.privacy.group_cap is None else len(_own_sizes(config, units))


def _own_sizes(config: Config, units: np.ndarray) -> np.ndarray:
    """Count the training examples of each person of a node."""
    left, _ = hold_out_of_client(config, 0, np.arange(len(units)), units)
    sizes: np.ndarray = np.unique(units[left], return_counts=True)[1]
    return sizes


_last_own: dict[str, tuple[tuple[Any, ...], list[Any], np.ndarray | None]] = {}
_MOST_OWN = 2  # a node's training and test examples


def _own_tests(config: Config) -> Config | None:
    """Return a config whose examples are those of a node's own file of test examples; None where there is none."""
    if not isinstance(config.data.client_test, str):
        return None
    data = config.data.model_copy(update={"name": config.data.client_test, "client_test": None})
    privacy = config.privacy.model_copy(update={"unit": None})  # a test file need not say whose its rows are
    return config.model_copy(update={"data": data, "privacy": privacy})


def _own_examples(config: Config) -> Examples:
    """Load a node's own examples, and its test examples where these are a file."""
    tests = _own_tests(config)
    train = _own_table(config)
    names = config.data.label_names if get_task(config.model.task).classes else None
    return Examples(train, None if tests is None else _own_table(tests), None, None, names)


def _own_table(config: Config) -> datasets.Dataset:
    table, rows = _own_rows(config)
    task = get_task(config.model.task)
    texts = {
        name: _any_messages(table, column, rows) if name == "messages" else _any_texts(table, column, rows, task.words)
        for name, column in _text_columns(config).items()
    }
    texts = _conversations(config, texts)
    empty = sum(not all(map(_has_text, row)) for row in zip(*texts.values(), strict=True))
    if empty:
        log.warning("%d of %d rows have no text in %s", empty, len(rows), " and ".join(_text_columns(config)))
    if (units := _own_units(config, table, rows)) is not None:
        texts[UNIT_COLUMN] = units.tolist()
    if not task.labelled:
        return _dataset(texts)
    labels = _own_labels(config, table, rows)
    return _dataset({**texts, "label": _own_classes(config, labels) if task.classes else labels})


def _own_rows(config: Config) -> tuple[Table, list[int]]:
    """Read the file, and say which of its rows are not blank."""
    data = config.data
    table = load_file(Path(data.name), "data.name", data.name, data.format, any_text=True)["train"]
    label = {"label": data.label} if get_task(config.model.task).labelled else {}
    for name, column in (_text_columns(config) | label).items():
        check_column(table, column, f"data.{name}")
    if len(table.columns) == 1:
        return table, list(range(table.rows))
    columns = [read() for read in table.columns.values()]
    rows = [row for row in range(table.rows) if not all(is_missing(column[row]) for column in columns)]
    if not rows:
        raise InputError("data.name", data.name, "holds no rows; give a file with examples")
    return table, rows


def _own_labels(config: Config, table: Table, rows: list[int]) -> list[Any]:
    """Return each row's label as its task reads it; None for a task without."""
    task = get_task(config.model.task)
    if not task.labelled:
        return [None] * len(rows)
    return task.read_labels(cells(table, config.data.label, "data.label", rows, Path(config.data.name).name, []), {})


def _own_units(config: Config, table: Table, rows: list[int]) -> np.ndarray | None:
    """Return the number of each row's person; None where the node does not tell persons."""
    if config.privacy.unit is None:
        return None
    return np.array(_read_units(config, table, rows, Path(config.data.name).name))


def _own_classes(config: Config, labels: list[Any]) -> list[Any]:
    """Return each label as numbers of classes."""
    only = _dataset({"label": labels})
    found: list[Any] = _encode(config, only, list(config.data.label_names or ()), "data.name")["label"][:]
    return found


def _any_texts(table: Table, column: str, rows: list[int], words: bool) -> list[Any]:
    """Return a column as texts or lists of words, whatever it holds: what is missing is empty, no text is marked."""
    values = table.columns[column]()
    if not words:
        return [_as_text(values[row]) for row in rows]
    return [list(map(_as_text, v)) if isinstance(v := values[row], list) else _as_text(v).split() for row in rows]


def _any_messages(table: Table, column: str, rows: list[int]) -> list[list[dict[str, str]]]:
    """Return a column as conversations, whatever it holds: what is none is empty, and the owner's log says so."""
    values, found = table.columns[column](), list[list[dict[str, str]]]()
    bad = [row for row in rows if not_messages(values[row])]
    if bad:
        why = not_messages(values[bad[0]])
        log.warning("%d of %d rows teach nothing: %s %s", len(bad), len(rows), table.place(bad[0]), why)
    left_out = set(bad)
    for row in rows:
        messages = [] if row in left_out else values[row]
        found.append([{"role": message["role"], "content": message["content"]} for message in messages])
    return found


def _has_text(value: str | list[Any] | dict[str, str]) -> bool:
    if isinstance(value, dict):
        value = value["content"]
    return bool(value.strip()) if isinstance(value, str) else any(map(_has_text, value))


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    # JSON allows halves of characters.
    return "" if is_missing(value) else str(value).encode("utf-8", "replace").decode("utf-8")


def _text_columns(config: Config) -> dict[str, str]:
    """Return the columns of the texts by their standard names."""
    return get_task(config.model.task).columns(config.data)


def _conversations(config: Config, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Make a conversation of each prompt and answer, if these go through the chat template."""
    if not config.data.templated or "prompt" not in columns:
        return columns
    pairs = zip(columns["prompt"], columns["answer"], strict=True)
    others = {name: values for name, values in columns.items() if name not in ("prompt", "answer")}
    return {"messages": [conversation(prompt, answer) for prompt, answer in pairs], **others}


def _subset_of_test(config: Config, test: datasets.Dataset | None) -> datasets.Dataset | None:
    most = config.data.max_test_examples
    if test is None or most is None or most >= len(test):
        return test
    order = np.random.default_rng([draw_seed(config), _SUBSET, 1]).permutation(len(test))
    return test.select(np.sort(order[:most]))


def source_identity(config: Config) -> list[Any]:
    """Describe where the examples come from such that another description means other content; JSON can hold it.

    Files count with path, size and time of change, assets with their checksums, hub data with the fingerprint of what
    lies in the local cache.
    """
    data = config.data
    found = [] if data.name == NODES else [identity(data.name, "data.name", data.subset)]
    for key in ("test", "validation", "public", "client_test"):
        given = getattr(data, key)
        if isinstance(given, str) and (is_asset(given) or find_path(given, f"data.{key}") is not None):
            found.append(identity(given, f"data.{key}"))
    return found


def with_absolute_paths(config: Config) -> Config:
    """Return a config that means the same files from any working directory.

    Names of assets, of the hub and of splits stay as they are.
    """

    def absolute(name: Any, bare: bool) -> Any:
        if not isinstance(name, str) or is_asset(name):
            return name
        path = Path(os.path.expanduser(name))
        # A folder may be called as a split is.
        is_path = bare or len(path.parts) > 1 or path.suffix.lower() in SUFFIXES
        return str(path.absolute()) if is_path and os.path.exists(path) else name

    model = config.model.model_copy(update={"name": absolute(config.model.name, True)})
    found = {name: absolute(getattr(config.data, name), False) for name in ("test", "validation", "public")}
    data = config.data.model_copy(update={"name": absolute(config.data.name, True), **found})
    return config.model_copy(update={"model": model, "data": data})


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
        If it is something else, or a transform makes its values as they are read.

    Notes
    -----
    Of a format (``set_format``) the columns count; values are the same in every format.
    """
    import datasets
    import pyarrow as pa

    splits = dict(source) if isinstance(source, Mapping) else {"train": source}
    if not splits or not all(isinstance(table, datasets.Dataset) for table in splits.values()):
        kind = type(source).__name__ if not isinstance(source, Mapping) else f"{_kinds(splits)} in a mapping"
        raise InputError("data", kind, "give a datasets.Dataset, or a mapping of split names to such")
    for name, table in splits.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*", name):
            raise InputError("data", name, "is no name of a split; use letters, digits and '_', such as train")
        if table.format["type"] == "custom":
            remedy = f"split {name} has a transform that makes its values as they are read; apply it first with map()"
            raise InputError("data", type(source).__name__, remedy)
    splits = {name: without_format(table) for name, table in splits.items()}
    digest = hashlib.sha256()
    for name, table in sorted(splits.items()):
        digest.update(f"{name}\n{table.features!r}\n".encode())
        content = table.with_format("arrow")[:].replace_schema_metadata(None).combine_chunks()
        with pa.ipc.new_stream(_HashSink(digest), content.schema) as writer:
            writer.write_table(content)
    folder = cache_dir() / "memory" / digest.hexdigest()[:32]

    def build(target: Path) -> None:
        with quiet():
            datasets.DatasetDict(splits).save_to_disk(str(target))

    return str(build_once(folder, build, "data", type(source).__name__))


def _kinds(splits: Mapping[Any, Any]) -> str:
    return ", ".join(sorted({type(table).__name__ for table in splits.values()})) or "nothing"


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

Sources = dict[str, tuple[Table, str]]
"""The tables of train, test, validation and public, each with the key that names its source."""


def _sources(config: Config, header: bool = False) -> Sources:
    """Find the tables of a run; what is a share of train has none.

    With ``header`` they have the names of their columns alone, and those that only loading would tell are left out.
    """
    data, found = config.data, Sources()

    def read(part: str, name: str, *about: str | None) -> dict[str, Table] | None:
        field = "data.name" if part == "train" else f"data.{part}"
        if not header:
            return load_tables(name, field, *about)
        return load_headers(name, field, set(_columns_of(config, part).values()), *about)

    splits: dict[str, Table] | None = {}
    if data.name != NODES:
        splits = read("train", data.name, data.format, data.subset)
    if data.name != NODES and splits is not None:
        train = _train_split(config, splits)
        found["train"] = splits[train], "data.name"
        if data.test is None and "test" in splits and train != "test":
            found["test"] = splits["test"], "data.name"
    for part in ("test", "validation", "public"):
        given = getattr(data, part)
        if isinstance(given, str):  # else it is not there, or a share of train
            table = _other(config, splits, part, given, read)
            if table is not None:
                found[part] = table, f"data.{part}"
    return found


def _columns_of(config: Config, part: str) -> dict[str, str]:
    """Return the columns that examples for a part of a run must have, by the keys that name them."""
    data, task = config.data, get_task(config.model.task)
    found = {f"data.{key}": column for key, column in _text_columns(config).items()}
    if task.labelled:
        found["data.label"] = data.label
    first_is_right = data.prompt is not None and data.answer is None
    chosen_from = first_is_right or (part == "test" and config.evaluation.kind == "choice")
    if data.choices is not None and task.answers and chosen_from:
        found["data.choices"] = data.choices
    if part == "train" and data.partition.column is not None:
        found["data.partition.column"] = data.partition.column
    if part == "train" and config.privacy.unit is not None:
        found["privacy.unit"] = config.privacy.unit
    return found


def _dataset(columns: Mapping[str, Any]) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_dict(columns)


# Splits.


def _hold_out(
    config: Config, train: datasets.Dataset, held: int, seed: list[int]
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Draw ``held`` examples out of train, or persons of so many; both parts stay in the order of the source."""
    units = np.array(train[UNIT_COLUMN][:]) if UNIT_COLUMN in train.column_names else None
    chosen = _drawn(len(train), held, seed, units)
    if chosen.all():
        remedy = f"names too few persons to hold out {held} examples of some of them; give test and validation data"
        raise InputError("privacy.unit", config.privacy.unit, remedy)
    out = train.select(np.flatnonzero(chosen))
    return train.select(np.flatnonzero(~chosen)), out.select_columns(
        [n for n in out.column_names if n not in (PARTITION_COLUMN, UNIT_COLUMN)]
    )


def _drawn(rows: int, held: int, seed: list[int], units: np.ndarray | None) -> np.ndarray:
    """Draw ``held`` of so many rows, or the fewest persons in a random order that have so many; say which rows."""
    random, chosen = np.random.default_rng(seed), np.zeros(rows, bool)
    if units is None or not held:
        chosen[random.permutation(rows)[:held]] = True
        return chosen
    _, persons, sizes = np.unique(units, return_inverse=True, return_counts=True)
    order = random.permutation(len(sizes))
    return np.isin(persons, order[: 1 + np.searchsorted(sizes[order].cumsum(), held)])


def _train_split(config: Config, splits: Mapping[str, Table]) -> str:
    wanted = config.data.train
    if wanted is None:
        if len(splits) == 1:
            return next(iter(splits))
        wanted = "train"
    if wanted not in splits:
        raise InputError("data.train", config.data.train, f"there is no split {wanted!r}; splits: {', '.join(splits)}")
    return wanted


def _other(
    config: Config,
    splits: Mapping[str, Table] | None,
    part: str,
    given: str,
    read: Callable[[str, str], dict[str, Table] | None],
) -> Table | None:
    """Find the table of a split of the training data, or of a source of its own; None where nobody can tell yet."""
    field = f"data.{part}"
    if splits is not None and given in splits:
        return splits[given]
    if not is_asset(given) and find_path(given, field) is None:
        if splits is None:
            return None
        if config.data.name == NODES:
            raise InputError(field, given, f"there is no such file on the server, in {Path.cwd()}; give its path there")
        raise InputError(field, given, f"is no split (splits: {listed(splits)}) and no file; give one of these")
    loaded = read(part, given)
    if loaded is None:
        return None
    table = loaded.get(part) or (next(iter(loaded.values())) if len(loaded) == 1 else None)
    if table is None:
        raise InputError(field, given, f"holds the splits {listed(loaded)}; give a source with one split")
    return table


# Columns.


def _shape_others(config: Config, sources: Sources, notes: list[str]) -> dict[str, datasets.Dataset]:
    """Shape what is there beside the training examples."""
    return {part: _shape(config, *source, notes) for part, source in sources.items() if part != "train"}


def _shape(config: Config, table: Table, field: str, notes: list[str], is_train: bool = False) -> datasets.Dataset:
    """Pick the columns under their standard names, labels as words; drop rows without text."""
    data, task = config.data, get_task(config.model.task)
    value = getattr(data, field.removeprefix("data."))
    source = Path(str(value)).name
    notes.extend(f"{source}: {note}" for note in table.notes)
    texts = _text_columns(config)
    columns: dict[str, list[Any]] = {}
    for name, column in texts.items():
        read: Any = read_messages if name == "messages" else read_words if task.words else read_texts
        columns[name] = read(table, column, f"data.{name}", source)
    keep = np.array([all(v and _has_text(v) for v in row) for row in zip(*columns.values(), strict=True)], bool)
    rows = np.flatnonzero(keep).tolist()
    if not rows:
        raise InputError(field, value, f"no row has a text in {' and '.join(map(repr, texts.values()))}; give examples")
    if len(rows) < table.rows:
        first = table.place(int(np.flatnonzero(~keep)[0]))
        notes.append(f"{source}: {table.rows - len(rows)} of {table.rows} rows have no text and are left out ({first})")
    if "domain" in table.columns:
        domains = ("" if is_missing(domain) else str(domain) for domain in read_column(table, "domain", "domain"))
        columns["domain"] = [domain if domain.strip() else "(none)" for domain in domains]
    kept: dict[str, list[Any]] = {name: [values[row] for row in rows] for name, values in columns.items()}
    if data.choices is not None and task.answers and _needs_choices(config, table):
        options = cells(table, data.choices, "data.choices", rows, source, notes)
        right = [answer_of(messages) for messages in kept["messages"]] if "messages" in kept else kept.get("answer")
        kept["choices"] = read_choices(options, right)
        if right is None:
            kept["answer"] = [choices[0] for choices in kept["choices"]]
    kept = _conversations(config, kept)
    if "messages" in kept:
        kept[PLACE] = [f"{table.place(row)} of {source}" for row in rows]
    if task.labelled:
        kept["label"] = task.read_labels(cells(table, data.label, "data.label", rows, source, notes), kept)
    if is_train and data.partition.column is not None:
        kept[PARTITION_COLUMN] = read_owners(table, data.partition.column, rows, source)
    if is_train and config.privacy.unit is not None:
        kept[UNIT_COLUMN] = _read_units(config, table, rows, source)
    return _dataset(kept)


def _read_units(config: Config, table: Table, rows: list[int], source: str) -> list[int]:
    """Number the persons in the order of their names."""
    assert config.privacy.unit is not None
    field = "data.unit" if config.data.test == SERVER else "privacy.unit"  # as a node's own file has it
    owners: Any = read_owners(table, config.privacy.unit, rows, source, field)
    found: list[int] = np.unique(np.array(owners), return_inverse=True)[1].tolist()
    return found


def _needs_choices(config: Config, table: Table) -> bool:
    """Whether the first choice is the answer; or the right one is looked for, and the table has choices."""
    data = config.data
    if data.prompt is not None and data.answer is None:
        return True
    return config.evaluation.kind == "choice" and data.choices in table.columns


# Labels.


def _encode_train(config: Config, source: Table, table: datasets.Dataset) -> tuple[datasets.Dataset, list[str]]:
    if config.data.label_names is not None:
        names = list(config.data.label_names)
    elif config.data.label in source.classes:
        names = source.classes[config.data.label]
    else:
        names = _sorted_labels(config, table)
    _check_classes(config, names)
    return _encode(config, table, names, "data.name"), names


def _sorted_labels(config: Config, table: datasets.Dataset) -> list[str]:
    task = get_task(config.model.task)

    def order(name: str) -> tuple[bool, int, str]:
        number = INTEGER.fullmatch(name) is not None
        return not number, int(name) if number else 0, name

    return sorted({name for label in table["label"] for name in task.names_in(label)}, key=order)


def _check_classes(config: Config, names: list[str]) -> None:
    if len(names) < 2:
        has = f"has the one class {names[0]!r}" if names else "names no class at all"
        remedy = f"{has}; classification needs two or more"
        raise InputError("data.label", config.data.label, remedy)


def _encode(config: Config, table: datasets.Dataset, names: list[str], field: str) -> datasets.Dataset:
    index, task = {name: number for number, name in enumerate(names)}, get_task(config.model.task)
    labels = table["label"][:]
    unknown = next((name for label in labels for name in task.names_in(label) if name not in index), None)
    if unknown is not None:
        where = "never occurs in train" if config.data.label_names is None else "is not in data.label_names"
        remedy = f"the label {unknown!r} {where} (labels there: {', '.join(names[:10])}); fix the labels"
        raise LabelError(field, getattr(config.data, field.removeprefix("data.")), remedy)
    columns = {name: table[name][:] for name in table.column_names if name != "label"}
    return _dataset({**columns, "label": [task.number(label, index) for label in labels]})
