"""Tokenised examples, made once and then shared by every process through the cache.

A prepared data set is a folder of ``.npy`` files that are opened as memory maps, so a worker that holds a thousand
clients holds none of their tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import torch

from fedlora.assets import build_once, cache_dir, find_asset, is_asset
from fedlora.config import SERVER, Config, PartitionSection
from fedlora.data.coverage import Coverage, check_coverage, coverage_notes
from fedlora.data.sources import load_examples, source_identity
from fedlora.errors import InputError
from fedlora.models import load_tokenizer, model_config, pretrained_source, vocabulary_size

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a position that has no loss."""

# Part of the cache's key: raise it when the same config would give other files.
_LAYOUT = 3
_CHUNK = 1000
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
        Class of each row, int64 [rows]; None for causal-lm.
    answer_start : np.ndarray, optional
        Number of leading tokens of each row without loss, int64 [rows]; for causal-lm.
    domain : np.ndarray, optional
        Index of each row's domain in :attr:`FederatedData.domain_names`, int64 [rows].
    pad_token_id : int
        What fills the rows of a batch.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        labels: np.ndarray | None,
        answer_start: np.ndarray | None,
        domain: np.ndarray | None,
        pad_token_id: int,
    ) -> None:
        self.tokens, self.offsets, self.labels = tokens, offsets, labels
        self.answer_start, self.domain, self.pad_token_id = answer_start, domain, pad_token_id
        self.lengths: np.ndarray = np.diff(offsets)
        self._resident: _ResidentTable | None = None

    def __len__(self) -> int:
        return len(self.lengths)

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
            ``input_ids`` and ``attention_mask``, int64 [N, T]; ``labels``, int64: the classes [N], or for causal-lm
            the token ids [N, T] with -100 on prompts and padding.
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
        ids = np.full(mask.shape, self.pad_token_id, np.int64)
        ids[mask] = self.tokens[(np.asarray(self.offsets)[rows][:, None] + positions)[mask]]
        if self.labels is not None:
            labels = np.array(self.labels[rows], np.int64)
        elif self.answer_start is not None:
            labels = np.where(mask & (positions >= self.answer_start[rows][:, None]), ids, IGNORED)
        else:
            raise ValueError("the table has neither labels nor answers")
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": torch.from_numpy(labels),
        }


class _ResidentTable:
    """A token table on a GPU: a batch is put together there, and only its row numbers travel."""

    def __init__(self, table: TokenTable, device: torch.device) -> None:
        self.device, self.pad_token_id = device, table.pad_token_id
        self.tokens = torch.from_numpy(np.array(table.tokens)).to(device)
        self.offsets = torch.from_numpy(np.array(table.offsets, np.int64)).to(device)
        first = table.labels if table.labels is not None else table.answer_start
        self.first = torch.from_numpy(np.array(first, np.int64)).to(device)
        self.classify = table.labels is not None

    @classmethod
    def of(cls, table: TokenTable, device: torch.device) -> _ResidentTable | None:
        """Return the table on the device, or None where it would take too much of it."""
        free, _ = torch.cuda.mem_get_info(device)
        return cls(table, device) if table.tokens.size * 4 + len(table) * 16 < free / 10 else None

    def batch(self, rows: np.ndarray, lengths: np.ndarray) -> dict[str, torch.Tensor]:
        """Do as :meth:`TokenTable.batch`; nothing here waits for the device. Without padding there is no mask."""
        chosen = torch.from_numpy(rows).to(self.device, non_blocking=True)
        longest = int(lengths.max(initial=0))
        start, positions = self.offsets[chosen], torch.arange(longest, device=self.device)
        mask = positions < (self.offsets[chosen + 1] - start)[:, None]
        places = (start[:, None] + positions).clamp_(max=len(self.tokens) - 1)
        ids = torch.where(mask, self.tokens[places].long(), self.pad_token_id)
        if self.classify:
            labels = self.first[chosen]
        else:
            labels = torch.where(mask & (positions >= self.first[chosen][:, None]), ids, IGNORED)
        batch = {"input_ids": ids, "labels": labels}
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
        The classes; None for causal-lm.
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

    def label_counts(self) -> np.ndarray:
        """Count the examples of each client and class, int64 [clients, labels] (one column for causal-lm)."""
        if self.train.labels is None or self.label_names is None:
            return self.partition.sizes[:, None].copy()
        labels, count = np.asarray(self.train.labels), len(self.label_names)
        return np.stack([np.bincount(labels[rows], minlength=count) for rows in self.partition])


def prepare_data(config: Config) -> FederatedData:
    """Load, tokenise and partition the examples of a run, or open what an earlier call made of the same.

    For classification a row is the tokenised text with the tokenizer's special tokens; for causal-lm it is the text, or
    prompt and answer one after the other as they are given (only the answer has a loss), and the end-of-sequence token.
    Rows are cut to ``model.max_length``; a row whose answer is cut off wholly is dropped with a warning. A node keeps
    it, without a loss: the number of its examples is public. So is a row that its tokenizer cannot read, or that gives
    no token of the model's: a special token stands for it, and the node's own log says how many there are.

    The cache's key covers the tokenizer's files, ``data.*``, ``run.seed``, ``model.task``, ``model.max_length`` and the
    sources as :func:`~fedlora.data.sources.source_identity` sees them.

    Raises
    ------
    InputError
        If the model, the examples or the partition cannot be used.
    """
    pretrained = model_config(config)
    vocabulary = vocabulary_size(pretrained)
    folder = cache_dir() / "tokens" / _key(config, pretrained)
    build_once(folder, lambda target: _build(config, vocabulary, target), "data.name", config.data.name)
    data = _open(config, folder)
    _look_at_texts(config, vocabulary, data)
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
        return
    try:
        check_coverage(name, length, tables, vocabulary)
    except InputError as error:
        logger.warning("%s", error)
    for note in coverage_notes(length, tables):
        logger.info("%s", note)


def _key(config: Config, pretrained: Any) -> str:
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
        "task": config.model.task,
        "max_length": config.model.max_length,
        # Nothing of a node's file is drawn.
        "seed": None if _is_own(config) else config.run.seed,
        "data": config.data.model_dump(),
        "vocabulary": vocabulary_size(pretrained),
        "source": source_identity(config),
        "versions": [version(package) for package in _PACKAGES],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _is_own(config: Config) -> bool:
    """Whether the examples are a node's own file, of whose texts no error may depend."""
    return config.data.test == SERVER


def _build(config: Config, vocabulary: int | None, target: Path) -> None:
    examples = load_examples(config)
    tokenizer = load_tokenizer(config)
    if _is_own(config):
        tokenizer = AnyText(tokenizer, vocabulary)
    coverage: dict[str, Coverage] = {name: Coverage() for name in _TABLES}
    tables = {name: table for name in _TABLES if (table := getattr(examples, name)) is not None}
    with_domain = [table for table in tables.values() if "domain" in table.column_names]
    domains = sorted({domain for table in with_domain for domain in table["domain"][:]})
    kept = {
        name: _write_table(config, target, name, table, tokenizer, domains, coverage[name])
        for name, table in tables.items()
    }
    counts = {name: coverage[name].to_dict() for name in tables}
    (target / "coverage.json").write_text(json.dumps(counts), encoding="utf-8")
    train = kept.get("train")
    clients, names = _clients(config, train, examples.label_names)
    np.save(target / "partition.rows.npy", np.concatenate([np.empty(0, np.int64), *clients]))
    np.save(target / "partition.offsets.npy", _offsets([len(rows) for rows in clients]))
    meta = {
        "label_names": examples.label_names,
        "domain_names": domains,
        "client_names": names,
        "pad_token_id": tokenizer.pad_token_id,
        "tables": list(tables),
        "notes": examples.notes,
    }
    (target / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


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
    domains: list[str],
    coverage: Coverage,
) -> datasets.Dataset:
    """Write the files of one split; return the examples that are in them."""
    rows: list[list[int]] = []
    starts: list[int] = []
    for first in range(0, len(table), _CHUNK):
        chunk = table[first : first + _CHUNK]
        if config.model.task == "sequence-classification":
            new_rows = _encode(tokenizer, chunk["text"], config.model.max_length)
            _count(coverage, tokenizer, chunk["text"], new_rows, config.model.max_length)
            rows += new_rows
        else:
            new_rows, new_starts = _causal(config, tokenizer, chunk)
            texts = chunk.get("text") or [a + b for a, b in zip(chunk["prompt"], chunk["answer"], strict=True)]
            coverage.add(texts, new_rows, tokenizer, config.model.max_length)
            rows += [ids[: config.model.max_length] for ids in new_rows]
            starts += new_starts
    if config.model.task == "causal-lm":
        keep = [row for row, (ids, start) in enumerate(zip(rows, starts, strict=True)) if len(ids) > start]
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
            rows, starts, table = [rows[row] for row in keep], [starts[row] for row in keep], table.select(keep)
        np.save(target / f"{name}.answer_start.npy", np.array(starts, np.int64))
    else:
        np.save(target / f"{name}.labels.npy", np.array(table["label"][:], np.int64))
    np.save(target / f"{name}.tokens.npy", np.concatenate([np.array(ids, np.int32) for ids in rows]))
    np.save(target / f"{name}.offsets.npy", _offsets([len(ids) for ids in rows]))
    if "domain" in table.column_names:
        index = {domain: number for number, domain in enumerate(domains)}
        np.save(target / f"{name}.domain.npy", np.array([index[domain] for domain in table["domain"][:]], np.int64))
    return table


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

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        """Return the ids of every text, at least one each."""
        rows = self._ids(texts, options)
        if rows is None:
            rows = [found[0] if (found := self._ids([text], options)) else [] for text in texts]
        usable = [row if row and self._fits(row) else self.fixed for row in rows]
        replaced = sum(row is self.fixed for row in usable)
        if replaced:
            logger.warning(
                "%d of %d rows have no token that the model knows; a special one stands there", replaced, len(rows)
            )
        return {"input_ids": usable}

    def _ids(self, texts: list[str], options: dict[str, Any]) -> list[list[int]] | None:
        try:
            rows: list[list[int]] = self.tokenizer(texts, **options)["input_ids"]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizers' is no Exception
            logger.warning("the tokenizer fails (%s)", type(error).__name__)
            return None
        return rows if len(rows) == len(texts) else None

    def _fits(self, ids: Sequence[int]) -> bool:
        return min(ids) >= 0 and (self.vocabulary is None or max(ids) < self.vocabulary)


def _count(coverage: Coverage, tokenizer: Any, texts: list[str], rows: list[list[int]], max_length: int) -> None:
    """Count rows that are cut already: those that may be are made again whole."""
    long = [number for number, ids in enumerate(rows) if len(ids) >= max_length]
    whole = dict(zip(long, _encode(tokenizer, [texts[number] for number in long], None), strict=True)) if long else {}
    coverage.add(texts, [whole.get(number, ids) for number, ids in enumerate(rows)], tokenizer, max_length)


def _encode(tokenizer: Any, texts: list[str], max_length: int | None, special: bool = True) -> list[list[int]]:
    found = tokenizer(
        texts,
        add_special_tokens=special,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = found["input_ids"]
    return ids


def _causal(config: Config, tokenizer: Any, chunk: dict[str, list[str]]) -> tuple[list[list[int]], list[int]]:
    """Return token ids of whole rows, not cut yet, and how many of each row's first tokens have no loss."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("model.name", config.model.name, "its tokenizer has no eos token; causal-lm needs one")
    if "text" in chunk:
        # A tokenizer may close its rows itself.
        texts = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in _encode(tokenizer, chunk["text"], None)]
        return texts, [0] * len(texts)
    prompts = [ids[:-1] if ids[-1:] == [eos] else ids for ids in _encode(tokenizer, chunk["prompt"], None)]
    answers = _encode(tokenizer, chunk["answer"], None, special=False)
    rows = [[*prompt, *answer, eos] for prompt, answer in zip(prompts, answers, strict=True)]
    return rows, [len(prompt) for prompt in prompts]


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _open(config: Config, folder: Path) -> FederatedData:
    def load(name: str) -> np.ndarray:
        array: np.ndarray = np.load(folder / f"{name}.npy", mmap_mode="r")
        return array

    def optional(name: str) -> np.ndarray | None:
        return load(name) if (folder / f"{name}.npy").is_file() else None

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
            )
            for name in meta["tables"]
        }
        partition = Partition(load("partition.rows"), load("partition.offsets"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        remedy = f"its tokens in the cache are damaged ({type(error).__name__}); delete {folder} and run again"
        raise InputError("data.name", config.data.name, remedy) from None
    none = np.empty(0, np.int64)
    absent = TokenTable(none, np.zeros(1, np.int64), none, none, None, meta["pad_token_id"])
    return FederatedData(
        tables.get("train", absent),
        tables.get("test", absent),
        tables.get("validation"),
        tables.get("public"),
        meta["label_names"],
        meta["domain_names"],
        partition,
        meta["client_names"],
        folder,
        meta["notes"],
    )
