"""Tokenised examples, made once and then shared by every process through the cache.

A prepared data set is a folder of ``.npy`` files that are opened as memory maps, so a worker that holds a thousand
clients holds none of their tokens.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from fedlora.assets import build_once, cache_dir, find_asset, is_asset
from fedlora.config import SERVER, Config, PartitionSection, PrivacySection
from fedlora.data.coverage import Coverage, check_coverage, coverage_notes
from fedlora.data.questions import Questions, prepare_questions
from fedlora.data.sources import (
    PLACE,
    UNIT_COLUMN,
    Examples,
    check_sources,
    draw_seed,
    hold_out_of_client,
    load_examples,
    source_identity,
)
from fedlora.data.units import at_most, unit_notes
from fedlora.errors import InputError
from fedlora.models import has_token_types, load_tokenizer, model_config, pretrained_source, vocabulary_size
from fedlora.tasks import IGNORED, Encoded, Task, get_task
from fedlora.tasks.chat import ChatTemplate
from fedlora.tasks.long_texts import Piece
from fedlora.timeline import phase

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# Part of the cache's key: raise it when the same config would give other files.
_LAYOUT = 4
_CHUNK = 1000
_KEPT = "train.kept.npy"
"""Which training example each row is of, where some have none or several."""

_TABLES = ("train", "test", "validation", "public")
_PACKAGES = ("transformers", "tokenizers", "datasets", "flwr-datasets", "numpy")
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


class TokenTable:
    """Tokenised examples of one split.

    Parameters
    ----------
    tokens : np.ndarray
        Token ids of all rows one after the other, int32.
    offsets : np.ndarray
        Row i is ``tokens[offsets[i]:offsets[i + 1]]``; int64 [rows + 1].
    labels : np.ndarray, optional
        Labels of whole rows: classes, int64 [rows], or numbers, float32 [rows] or [rows, labels]; None where each token
        has a label.
    answer_start : np.ndarray, optional
        Number of leading tokens of each row without loss, int64 [rows], where the tokens are the labels.
    domain : np.ndarray, optional
        Index of each row's domain in :attr:`FederatedData.domain_names`, int64 [rows].
    pad_token_id : int
        What fills the rows of a batch.
    task : Task
        Reads the labels: loss, statistics and metrics.
    label_names : list of str, optional
        The classes.
    tags : np.ndarray, optional
        Label of each token, int64, in the order of ``tokens``; -100 for none.
    token_types : np.ndarray, optional
        Which text of a pair each token is of, in the order of ``tokens``.
    units : np.ndarray, optional
        The person whose each row is, numbered from 0, int64 [rows].
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        labels: np.ndarray | None,
        answer_start: np.ndarray | None,
        domain: np.ndarray | None,
        pad_token_id: int,
        task: Task,
        label_names: list[str] | None = None,
        *,
        tags: np.ndarray | None = None,
        token_types: np.ndarray | None = None,
        units: np.ndarray | None = None,
    ) -> None:
        self.tokens, self.offsets, self.labels = tokens, offsets, labels
        self.answer_start, self.domain, self.pad_token_id = answer_start, domain, pad_token_id
        self.task, self.label_names, self.tags, self.token_types = task, label_names, tags, token_types
        self.units = units
        self.lengths: np.ndarray = np.diff(offsets)
        self._resident: _ResidentTable | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def rows_per_unit(self) -> int:
        """How many rows a person has in the mean, rounded up."""
        assert self.units is not None
        return -(-len(self) // len(np.unique(self.units)))

    def batch(self, rows: np.ndarray | Sequence[int], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """Return rows as tensors, in the order given, padded on the right to the longest of them.

        Parameters
        ----------
        rows : np.ndarray
            Row numbers [N]; N may be 0.
        device : torch.device or str
            On a GPU the table is kept there from the first batch on, if it fits into a tenth of what is free.

        Returns
        -------
        dict
            ``input_ids`` and ``attention_mask``, int64 [N, T], and ``token_type_ids`` of pairs; ``labels``: classes
            [N], int64; numbers [N] or [N, labels], float32; or a label a token [N, T], int64, with -100 where there is
            none, such as on prompts and padding.
        """
        rows = np.asarray(rows, dtype=np.int64)
        device = torch.device(device)
        if device.type == "cuda":
            if self._resident is None or self._resident.device != device:
                self._resident = _ResidentTable.of(self, device)
            if self._resident is not None:
                return self._resident.batch(rows, self.lengths[rows])
        return {name: value.to(device) for name, value in self._host_batch(rows).items()}

    def _host_batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        lengths = self.lengths[rows]
        positions = np.arange(lengths.max(initial=0))
        mask = positions < lengths[:, None]
        places = (np.asarray(self.offsets)[rows][:, None] + positions)[mask]

        def padded(values: np.ndarray, padding: int) -> np.ndarray:
            filled = np.full(mask.shape, padding, np.int64)
            filled[mask] = values[places]
            return filled

        ids = padded(self.tokens, self.pad_token_id)
        if self.labels is not None:
            labels = np.array(self.labels[rows])
        elif self.tags is not None:
            labels = padded(self.tags, IGNORED)
        elif self.answer_start is not None:
            labels = np.where(mask & (positions >= self.answer_start[rows][:, None]), ids, IGNORED)
        else:
            raise ValueError("the table has neither labels nor answers")
        batch = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}
        if self.token_types is not None:
            batch["token_type_ids"] = padded(self.token_types, 0)
        return {name: torch.from_numpy(values) for name, values in batch.items()}


class _ResidentTable:
    """A token table on a GPU: a batch is put together there, and only its row numbers travel."""

    def __init__(self, table: TokenTable, device: torch.device) -> None:
        self.device, self.pad_token_id = device, table.pad_token_id

        def moved(values: np.ndarray | None) -> torch.Tensor | None:
            return None if values is None else torch.from_numpy(np.array(values)).to(device)

        self.tokens = torch.from_numpy(np.array(table.tokens)).to(device)
        self.offsets = torch.from_numpy(np.array(table.offsets, np.int64)).to(device)
        self.labels, self.answer_start = moved(table.labels), moved(table.answer_start)
        self.tags, self.token_types = moved(table.tags), moved(table.token_types)

    @classmethod
    def of(cls, table: TokenTable, device: torch.device) -> _ResidentTable | None:
        """Return the table on the device, or None where it would take too much of it."""
        free, _ = torch.cuda.mem_get_info(device)
        arrays = (table.tokens, table.offsets, table.labels, table.answer_start, table.tags, table.token_types)
        return cls(table, device) if sum(a.nbytes for a in arrays if a is not None) < free / 10 else None

    def batch(self, rows: np.ndarray, lengths: np.ndarray) -> dict[str, torch.Tensor]:
        """Do as :meth:`TokenTable.batch`; nothing here waits for the device. Without padding there is no mask."""
        chosen = torch.from_numpy(rows).to(self.device, non_blocking=True)
        longest = int(lengths.max(initial=0))
        start, positions = self.offsets[chosen], torch.arange(longest, device=self.device)
        mask = positions < (self.offsets[chosen + 1] - start)[:, None]
        places = (start[:, None] + positions).clamp_(max=len(self.tokens) - 1)
        ids = torch.where(mask, self.tokens[places].long(), self.pad_token_id)
        if self.labels is not None:
            labels = self.labels[chosen]
        elif self.tags is not None:
            labels = torch.where(mask, self.tags[places], IGNORED)
        else:
            assert self.answer_start is not None
            labels = torch.where(mask & (positions >= self.answer_start[chosen][:, None]), ids, IGNORED)
        batch = {"input_ids": ids, "labels": labels}
        if self.token_types is not None:
            batch["token_type_ids"] = torch.where(mask, self.token_types[places].long(), 0)
        return batch if (lengths == longest).all() else batch | {"attention_mask": mask.long()}


class Partition(Sequence[np.ndarray]):
    """The training rows of every client: ``partition[i]`` is a sorted int64 array, ``sizes`` are the lengths."""

    def __init__(self, rows: np.ndarray, offsets: np.ndarray) -> None:
        self.rows, self.offsets = rows, offsets
        self.sizes: np.ndarray = np.diff(offsets)

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, client: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, client: slice) -> Sequence[np.ndarray]: ...

    def __getitem__(self, client: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(client, slice):
            return [self[number] for number in range(len(self))[client]]
        if not -len(self) <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        client %= len(self)
        return self.rows[self.offsets[client] : self.offsets[client + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[client] for client in range(len(self)))


@dataclass
class FederatedData:
    """Everything that a run reads of its examples.

    Parameters
    ----------
    train, test : TokenTable
        Without a row where they lie elsewhere: the training examples on nodes, the test set on the server.
    validation, public : TokenTable, optional
    label_names : list of str, optional
        The classes; None for tasks without classes.
    domain_names : list of str
        The domains; empty without a column ``domain``.
    partition : Partition
        The rows of ``train`` that each client holds.
    client_names : list of str
        A number, or the value of the natural partition's column.
    folder : Path
        Where the files lie.
    notes : list of str
        What the user should know of the examples, such as how many tokens ``model.max_length`` cuts off.
    client_test : Partition, optional
        The rows of ``train`` that each client holds out to test on; None where nothing is.
    questions : Questions, optional
        What ``[evaluation]`` asks of the test examples.
    """

    train: TokenTable
    test: TokenTable
    validation: TokenTable | None
    public: TokenTable | None
    label_names: list[str] | None
    domain_names: list[str]
    partition: Partition
    client_names: list[str]
    folder: Path
    notes: list[str] = field(default_factory=list)
    client_test: Partition | None = None
    questions: Questions | None = None

    def own_test(self, client: int) -> tuple[TokenTable, np.ndarray]:
        """Return the table and the rows that a client tests on: rows that it holds out, or a node's own test file."""
        if self.client_test is not None:
            return self.train, self.client_test[client]
        return self.test, np.arange(len(self.test))

    def drawn_from(self, client: int, privacy: PrivacySection) -> int:
        """Return of how many a client's steps draw: persons (``privacy.unit``) or examples. Its weight follows."""
        return self._persons(client) if privacy.samples_units else len(self.partition[client])

    def units_of(self, client: int, privacy: PrivacySection) -> int | None:
        """Return of how many persons a client's examples are, where its steps draw single examples of them."""
        return self._persons(client) if privacy.group_cap is not None else None

    def _persons(self, client: int) -> int:
        assert self.train.units is not None
        return len(np.unique(self.train.units[self.partition[client]]))

    def drawn_sizes(self, privacy: PrivacySection) -> list[int]:
        """Return :meth:`drawn_from` of every client."""
        return [self.drawn_from(client, privacy) for client in range(len(self.partition))]

    def typical_units(self) -> np.ndarray:
        """Count the examples of each person of the client with the median number of persons; none without persons."""
        if self.train.units is None:
            return np.empty(0, np.int64)
        counts = [np.unique(self.train.units[rows], return_counts=True)[1] for rows in self.partition]
        found: np.ndarray = sorted(counts, key=len)[len(counts) // 2]
        return found

    @property
    def counted_names(self) -> list[str] | None:
        """The classes that :meth:`label_counts` counts; None where examples as a whole have none."""
        return None if self.train.labels is None else self.label_names

    def label_counts(self) -> np.ndarray:
        """Count the examples of each client and class, int64 [clients, labels] (one column without classes)."""
        if self.train.labels is None or self.label_names is None:
            return self.partition.sizes[:, None].copy()
        labels, count = np.asarray(self.train.labels), len(self.label_names)
        if labels.ndim == 2:
            return np.stack([labels[rows].sum(0).astype(np.int64) for rows in self.partition])
        return np.stack([np.bincount(labels[rows], minlength=count) for rows in self.partition])


@phase("data", "preparing the data")
def prepare_data(config: Config) -> FederatedData:
    """Load, tokenise and partition the examples of a run, or open what an earlier call made of the same.

    The task tokenises (:meth:`fedlora.tasks.Task.encode`). For most tasks a row is the text, or pair of texts, with the
    tokenizer's special tokens. Where the tokens are the labels it is the text, or prompt and answer (only the answer
    has a loss), and the end-of-sequence token; or a conversation as the tokenizer's chat template writes it, of which
    the assistant's turns have a loss (:meth:`fedlora.tasks.chat.ChatTemplate.encode`).
    Rows are cut to ``model.max_length``, or a long example becomes several rows of one client (``data.long_texts``). A
    row whose answer is cut off wholly is dropped, and said. A node keeps it, without a loss: the number of its examples
    is public. So is a row that its tokenizer cannot read, or that gives no token of the model's: a special token stands
    for it, and the node's own log says how many there are.

    The cache's key covers the tokenizer's files, ``data.*``, ``run.seed``, ``model.task``, ``model.max_length`` and the
    sources as :func:`~fedlora.data.sources.source_identity` sees them. Who holds which row is kept apart from the
    tokens, so that runs whose partition or seed differs share the tokens.

    Raises
    ------
    InputError
        If the model, the examples or the partition cannot be used.
    """
    if not _is_own(config):
        check_sources(config)
    pretrained = model_config(config)
    vocabulary = vocabulary_size(pretrained)
    key, divided = _keys(config, pretrained)
    folder = cache_dir() / "tokens" / key
    types = has_token_types(pretrained)
    examples = cache(lambda: load_examples(config))
    field, name = "data.name", config.data.name
    build_once(folder, lambda target: _build(config, examples(), vocabulary, types, target), field, name)
    partition = folder / "partitions" / divided
    build_once(partition, lambda target: _divide(config, examples(), folder, target), field, name)
    data = _open(config, folder, partition)
    _look_at_texts(config, vocabulary, data)
    if data.train.units is not None and not _is_own(config):
        data.notes.extend(unit_notes(config.privacy, data.train.units, data.partition))
    if config.evaluation.kind != "none":
        data.questions = prepare_questions(config, pretrained, lambda: examples().test, folder)
        data.notes.extend(data.questions.notes)
    return data


def _look_at_texts(config: Config, vocabulary: int | None, data: FederatedData) -> None:
    """Refuse a tokenizer that does not fit the texts, and note what is cut; on a node, say it in the owner's log alone.

    There the server chose the tokenizer, and a refusal would answer its question about the owner's texts.
    """
    name, length = config.model.name, config.model.max_length
    counts = json.loads((data.folder / "coverage.json").read_text(encoding="utf-8"))
    tables = {table: Coverage(**found) for table, found in counts.items()}
    if not _is_own(config):
        check_coverage(name, length, tables, vocabulary)
        data.notes.extend(coverage_notes(length, tables))
        most = tables["train"].most_rows if "train" in tables else 0
        if most and config.privacy.mode != "none" and not config.privacy.protects_units:
            data.notes.append(f"epsilon is that of one row, and a text of train is split into up to {most:,} rows")
        return
    try:
        check_coverage(name, length, tables, vocabulary)
    except InputError as error:
        logger.warning("%s", error)
    for note in coverage_notes(length, tables):
        logger.info("%s", note)


def _keys(config: Config, pretrained: Any) -> tuple[str, str]:
    """Return the names in the cache of the tokens, and of their partition."""
    source = pretrained_source(config)
    if is_asset(config.model.name):
        tokenizer: Any = sorted(find_asset(config.model.name).files.items())
    elif Path(source).is_dir():
        files = sorted({file for pattern in _TOKENIZER_FILES for file in Path(source).glob(pattern) if file.is_file()})
        # Index and configuration of the weights change nothing here, but are small and rarely differ.
        tokenizer = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
    else:
        tokenizer = [source, config.model.revision, getattr(pretrained, "_commit_hash", None)]
    parts = {
        "layout": _LAYOUT,
        "tokenizer": tokenizer,
        "task": [config.model.task, *map(_source, (type(get_task(config.model.task)), ChatTemplate, Piece))],
        "max_length": config.model.max_length,
        "seed": None if _is_own(config) else draw_seed(config),
        "data": config.data.model_dump(exclude={"seed", "partition", "client_test", "packing"}),
        "vocabulary": vocabulary_size(pretrained),
        "token_types": has_token_types(pretrained),
        "source": source_identity(config),
        "versions": [version(package) for package in _PACKAGES],
    }
    division: dict[str, Any] = {
        # Nothing of a node's file is drawn by a run's seed.
        "seeds": None if _is_own(config) else [config.run.seed, config.data.seed],
        "data": config.data.model_dump(include={"partition", "client_test"}),
    }
    if config.privacy.unit is not None:
        parts["unit"] = config.privacy.unit
        division["group"] = config.privacy.group_cap
    return _digest(parts), _digest(division)


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _source(kind: type) -> str:
    """Return the SHA-256 of the file that defines a class: an edited task gives other tokens and labels."""
    return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()


def _is_own(config: Config) -> bool:
    """Whether the examples are a node's own file, of whose texts no error may depend."""
    return config.data.test == SERVER


def _build(config: Config, examples: Examples, vocabulary: int | None, types: bool, target: Path) -> None:
    """Write the tokens of all tables."""
    tokenizer = load_tokenizer(config)
    if get_task(config.model.task).causal and tokenizer.eos_token_id is None:
        remedy = f"its tokenizer has no eos token; {config.model.task} needs one"
        raise InputError("model.name", config.model.name, remedy)
    types = types and "token_type_ids" in tokenizer.model_input_names
    if _is_own(config):
        tokenizer = AnyText(tokenizer, vocabulary)
    coverage: dict[str, Coverage] = {name: Coverage() for name in _TABLES}
    tables = {name: table for name in _TABLES if (table := getattr(examples, name)) is not None}
    with_domain = [table for table in tables.values() if "domain" in table.column_names]
    domains = sorted({domain for table in with_domain for domain in table["domain"][:]})
    for name, table in tables.items():
        _write_table(config, target, name, table, tokenizer, types, domains, coverage[name])
    counts = {name: coverage[name].to_dict() for name in tables}
    (target / "coverage.json").write_text(json.dumps(counts), encoding="utf-8")
    meta = {
        "label_names": examples.label_names,
        "domain_names": domains,
        "pad_token_id": tokenizer.pad_token_id,
        "tables": list(tables),
        "notes": examples.notes,
    }
    (target / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _divide(config: Config, examples: Examples, folder: Path, target: Path) -> None:
    """Write who holds which row of the training examples, of which the tokens are in ``folder``."""
    train, kept, rows_of = examples.train, folder / _KEPT, None
    if train is not None and kept.is_file():
        of, first, counts = np.unique(np.load(kept), return_index=True, return_counts=True)
        train, rows_of = train.select(of), (first, counts)
    clients, names = _clients(config, train, examples.label_names)
    units = None if train is None or UNIT_COLUMN not in train.column_names else np.array(train[UNIT_COLUMN][:])
    if isinstance(config.data.client_test, float):
        parts = [
            hold_out_of_client(config, client, rows, None if units is None else units[rows])
            for client, rows in enumerate(clients)
        ]
        clients = [rows for rows, _ in parts]
        _write_partition(target, "client_test", [_rows_of(held, rows_of) for _, held in parts])
    members = [_rows_of(rows, rows_of) for rows in clients]
    if units is not None and (most := config.privacy.group_cap) is not None:
        of, seed = np.load(folder / "train.units.npy"), 0 if _is_own(config) else draw_seed(config)
        members = [rows[at_most(of[rows], most, [seed, client])] for client, rows in enumerate(members)]
    _write_partition(target, "partition", members)
    (target / "names.json").write_text(json.dumps(names), encoding="utf-8")


def _rows_of(chosen: np.ndarray, where: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """Return the rows of examples that a client has: where they begin, and how many they are; else one each."""
    if where is None:
        return chosen
    first, counts = where
    return np.concatenate([np.empty(0, np.int64), *(np.arange(first[n], first[n] + counts[n]) for n in chosen)])


def _write_partition(target: Path, name: str, clients: list[np.ndarray]) -> None:
    np.save(target / f"{name}.rows.npy", np.concatenate([np.empty(0, np.int64), *clients]))
    np.save(target / f"{name}.offsets.npy", _offsets([len(rows) for rows in clients]))


def _clients(
    config: Config, train: datasets.Dataset | None, label_names: list[str] | None
) -> tuple[list[np.ndarray], list[str]]:
    """Return each client's rows, and the clients' names."""
    if train is None:
        return [], []
    if config.data.partition == PartitionSection(kind="iid", clients=1):
        # A node's own file; the partitioners take seconds to import.
        return [np.arange(len(train))], ["0"]
    from fedlora.data.partition import client_names, partition_rows

    clients = partition_rows(config, train, label_names)
    return clients, client_names(config, train, clients)


def _write_table(
    config: Config,
    target: Path,
    name: str,
    table: datasets.Dataset,
    tokenizer: Any,
    types: bool,
    domains: list[str],
    coverage: Coverage,
) -> None:
    """Write the files of one split."""
    task, rows, of = get_task(config.model.task), list[list[int]](), list[int]()
    encode = task.encode
    if config.data.long_texts == "split" and task.splits:
        encode = task.split  # type: ignore[attr-defined]
    starts, flat = list[int](), {"tags": list[list[int]](), "token_types": list[list[int]]()}
    with phase("tokens", f"tokenising {name}", len(table)) as here:
        for first in range(0, len(table), _CHUNK):
            examples = table[first : first + _CHUNK]
            encoded: Encoded = encode(tokenizer, examples, config.model.max_length, types)
            if encoded.refused:
                _replace_refused(config, encoded, examples, tokenizer)
            coverage.add(encoded, tokenizer, config.model.max_length)
            rows += encoded.tokens
            of += [first + number for number in (range(len(encoded.tokens)) if encoded.of is None else encoded.of)]
            starts += encoded.starts or []
            for kind, values in flat.items():
                values += getattr(encoded, kind) or []
            here.advance(min(_CHUNK, len(table) - first))
    if starts or (task.causal and flat["tags"]):
        keep = _with_loss(rows, starts, flat["tags"])
        dropped = len(rows) - len(keep)
        if dropped and _is_own(config):
            # The server chose the length: how many rows are left would answer its question about them.
            logger.warning("%d of %d rows have no loss: model.max_length cuts their answers off", dropped, len(rows))
        elif not keep:
            remedy = f"every prompt of {name} is longer than that, so no answer is left; raise it"
            raise InputError("model.max_length", config.model.max_length, remedy)
        elif dropped:
            logger.warning(
                "%d of %d rows of %s dropped: model.max_length cuts their answers off", dropped, len(rows), name
            )
            coverage.dropped_rows = dropped
            rows, of = [rows[row] for row in keep], [of[row] for row in keep]
            starts = [starts[row] for row in keep if starts]
            flat["tags"] = [flat["tags"][row] for row in keep if flat["tags"]]
    if of != list(range(len(table))):
        table = table.select(of)
        if name == "train":
            np.save(target / _KEPT, np.array(of, np.int64))
    if starts:
        np.save(target / f"{name}.answer_start.npy", np.array(starts, np.int64))
    if UNIT_COLUMN in table.column_names:
        np.save(target / f"{name}.units.npy", np.array(table[UNIT_COLUMN][:], np.int64))
    labels = task.label_array(table["label"][:]) if task.labelled else None
    if labels is not None:
        np.save(target / f"{name}.labels.npy", labels)
    for kind, values in flat.items():
        if values:
            np.save(target / f"{name}.{kind}.npy", np.concatenate([np.array(row, np.int64) for row in values]))
    np.save(target / f"{name}.tokens.npy", np.concatenate([np.array(ids, np.int32) for ids in rows]))
    np.save(target / f"{name}.offsets.npy", _offsets([len(ids) for ids in rows]))
    if "domain" in table.column_names:
        index = {domain: number for number, domain in enumerate(domains)}
        np.save(target / f"{name}.domain.npy", np.array([index[domain] for domain in table["domain"][:]], np.int64))


def _with_loss(rows: list[list[int]], starts: list[int], tags: list[list[int]]) -> list[int]:
    """Return the rows of which something is learnt; the first token of a row is predicted from none."""
    if starts:
        return [row for row, (ids, start) in enumerate(zip(rows, starts, strict=True)) if len(ids) > start]
    return [row for row, labels in enumerate(tags) if any(label != IGNORED for label in labels[1:])]


def _replace_refused(config: Config, encoded: Encoded, examples: dict[str, list[Any]], tokenizer: Any) -> None:
    """Refuse an example that cannot be encoded; on a node, let a special token without a loss stand for it.

    Raises
    ------
    InputError
        Naming the first one.
    """
    row, why = next(iter(encoded.refused.items()))
    if not _is_own(config):
        key = "template" if config.data.messages is None else "messages"
        place = examples[PLACE][row] if PLACE in examples else "an example"
        raise InputError(f"data.{key}", getattr(config.data, key), f"{place} {why}")
    logger.warning("%d rows teach nothing: one %s", len(encoded.refused), why)
    for row in encoded.refused:
        encoded.tokens[row] = encoded.whole[row] = tokenizer.fixed
        if encoded.tags is not None:
            encoded.tags[row] = [IGNORED]


_BESIDE: dict[str, tuple[str, list[Any]]] = {
    "token_type_ids": ("return_token_type_ids", [0]),
    "offset_mapping": ("return_offsets_mapping", [(0, 0)]),
}
"""By what a tokenizer returns beside ids: the option that asks for it, and its value for a row of one special token."""


class AnyText:
    """A tokenizer that gives ids for any text: one special token where its own fail, or are none of the model's.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    vocabulary : int, optional
        How many ids the model has; None if it does not say.

    Raises
    ------
    InputError
        If no special token is one of the model's.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.pad_token_id, self.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        special = (self.eos_token_id, tokenizer.cls_token_id, tokenizer.unk_token_id, self.pad_token_id)
        known = [token for token in special if token is not None and self._fits([token])]
        if not known or not self._fits([self.pad_token_id]):
            raise InputError("model.name", tokenizer.name_or_path, "its tokenizer has ids that the model has not")
        self.fixed = known[:1]

    def __getattr__(self, name: str) -> Any:
        """Have the tokenizer's own attributes."""
        return getattr(self.tokenizer, name)

    def __call__(
        self, texts: list[str], text_pair: list[str] | None = None, **options: Any
    ) -> dict[str, list[list[Any]]]:
        """Return what the tokenizer returns for every text or pair, with at least one id each."""
        found = self._found(texts, text_pair, options)
        blank = {"input_ids": self.fixed}
        blank |= {name: value for name, (option, value) in _BESIDE.items() if options.get(option)}
        if found is None:
            pairs = [None] * len(texts) if text_pair is None else [[pair] for pair in text_pair]
            alone = [self._found([text], pair, options) for text, pair in zip(texts, pairs, strict=True)]
            found = {name: [row[name][0] if row else [] for row in alone] for name in blank}
        replaced = 0
        for row, ids in enumerate(found["input_ids"]):
            if not ids or not self._fits(ids):
                replaced += 1
                for name, value in blank.items():
                    found[name][row] = value
        if replaced:
            logger.warning(
                "%d of %d rows have no token that the model knows; a special one stands there", replaced, len(texts)
            )
        return found

    def _found(
        self, texts: list[str], pairs: list[str] | None, options: dict[str, Any]
    ) -> dict[str, list[list[Any]]] | None:
        second = {} if pairs is None else {"text_pair": pairs}
        try:
            found = dict(self.tokenizer(texts, **second, **options))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizers' is no Exception
            logger.warning("the tokenizer fails (%s)", type(error).__name__)
            return None
        return found if len(found["input_ids"]) == len(texts) else None

    def _fits(self, ids: Sequence[int]) -> bool:
        return min(ids) >= 0 and (self.vocabulary is None or max(ids) < self.vocabulary)


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _open(config: Config, folder: Path, divided: Path) -> FederatedData:
    def load(name: str, place: Path = folder) -> np.ndarray:
        array: np.ndarray = np.load(place / f"{name}.npy", mmap_mode="r")
        return array

    def optional(name: str, place: Path = folder) -> np.ndarray | None:
        return load(name, place) if (place / f"{name}.npy").is_file() else None

    task = get_task(config.model.task)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tables = {
            name: TokenTable(
                load(f"{name}.tokens"),
                load(f"{name}.offsets"),
                optional(f"{name}.labels"),
                optional(f"{name}.answer_start"),
                optional(f"{name}.domain"),
                meta["pad_token_id"],
                task,
                meta["label_names"],
                tags=optional(f"{name}.tags"),
                token_types=optional(f"{name}.token_types"),
                units=optional(f"{name}.units"),
            )
            for name in meta["tables"]
        }
        partition = Partition(load("partition.rows", divided), load("partition.offsets", divided))
        client_names = json.loads((divided / "names.json").read_text(encoding="utf-8"))
        held = optional("client_test.rows", divided)
        client_test = None if held is None else Partition(held, load("client_test.offsets", divided))
    except (OSError, ValueError, KeyError, EOFError) as error:
        remedy = f"its tokens in the cache are damaged ({type(error).__name__}); delete {folder} and run again"
        raise InputError("data.name", config.data.name, remedy) from None
    none = np.empty(0, np.int64)
    absent = TokenTable(none, np.zeros(1, np.int64), none, none, None, meta["pad_token_id"], task, meta["label_names"])
    return FederatedData(
        tables.get("train", absent),
        tables.get("test", absent),
        tables.get("validation"),
        tables.get("public"),
        meta["label_names"],
        meta["domain_names"],
        partition,
        client_names,
        folder,
        meta["notes"],
        client_test,
    )
