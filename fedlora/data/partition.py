"""Who holds which training example, through the partitioners of flwr-datasets."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr
from typing import Any

import datasets
import numpy as np
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    ExponentialPartitioner,
    IidPartitioner,
    LinearPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    PathologicalPartitioner,
    ShardPartitioner,
    SquarePartitioner,
)

from fedlora.config import Config
from fedlora.data.sources import PARTITION_COLUMN
from fedlora.errors import InputError
from fedlora.tasks import get_task

_SIZE_SKEW = {"linear": LinearPartitioner, "square": SquarePartitioner, "exponential": ExponentialPartitioner}
_SHUFFLE = 3


def partition_rows(config: Config, train: datasets.Dataset, label_names: list[str] | None) -> list[np.ndarray]:
    """Divide the rows of the training examples among the clients.

    A function of the examples, ``data.partition`` and ``run.seed`` alone. The label-skew kinds (dirichlet,
    pathological, shard) skew ``data.partition.column`` if it is given, else the label, and divide as the partitioner of
    the same name with the same seed does. Rows may be left over with pathological (classes that no client drew), shard
    (less than a shard) and natural (groups beyond ``clients`` or below ``min_examples``).

    Parameters
    ----------
    config : Config
        Sections data.partition and run (seed) are used.
    train : datasets.Dataset
        The training examples, see :class:`~fedlora.data.sources.Examples`.
    label_names : list of str, optional
        The classes; None for tasks without classes.

    Returns
    -------
    list of np.ndarray
        One sorted int64 array of row numbers for each client; disjoint. With natural, clients are in the order of
        the column's values.

    Raises
    ------
    InputError
        If a client would have fewer than ``min_examples`` examples, or the partition is not possible.
    """
    partition, n = config.data.partition, len(train)
    if partition.clients is not None and partition.clients > n and partition.kind != "natural":
        remedy = f"there are only {n} training examples; take at most that many clients"
        raise InputError("data.partition.clients", partition.clients, remedy)
    rows = np.arange(n)
    if partition.kind in ("iid", "size"):
        # These partitioners cut contiguous pieces.
        rows = np.random.default_rng([config.run.seed, _SHUFFLE]).permutation(n)
        values = np.zeros(n, np.int64)
    else:
        # Numbers in the order of the values: quick to compare, and of a type that every partitioner takes.
        values = np.unique(_skewed(config, train, label_names), return_inverse=True)[1].astype(np.int64)
    if partition.kind == "pathological" and partition.classes_per_client > values.max() + 1:
        remedy = f"there are only {values.max() + 1} different values; lower it"
        raise InputError("data.partition.classes_per_client", partition.classes_per_client, remedy)
    table = datasets.Dataset.from_dict({"row": rows, "value": values}).with_format("numpy")
    try:
        clients = _divide(_partitioner(config), table)
    except (ValueError, ZeroDivisionError) as error:
        # The shard partitioner divides by the size of a shard, which is 0 if there are more shards than examples.
        why = "there are fewer" if isinstance(error, ZeroDivisionError) else str(error)
        raise _impossible(config, why) from None
    if partition.kind == "natural":
        clients = _largest(config, clients)
    few = [client for client, members in enumerate(clients) if len(members) < partition.min_examples]
    if few:
        raise _impossible(config, f"client {few[0]} would have {len(clients[few[0]])}")
    return clients


def client_names(config: Config, train: datasets.Dataset, clients: list[np.ndarray]) -> list[str]:
    """Name the clients: by the value of their column with kind natural, else by their number."""
    if config.data.partition.kind != "natural":
        return [str(number) for number in range(len(clients))]
    column = train[_column(config, train)]
    return [str(column[int(members[0])]) for members in clients]


def _column(config: Config, train: datasets.Dataset) -> str:
    wanted = config.data.partition.column
    if wanted is None:
        return "label"
    return PARTITION_COLUMN if PARTITION_COLUMN in train.column_names else wanted


def _skewed(config: Config, train: datasets.Dataset, label_names: list[str] | None) -> np.ndarray:
    wanted = config.data.partition.column
    if wanted is None and not (label_names is not None and get_task(config.model.task).one_class):
        raise InputError("data.partition.column", None, "is required without labels: the column to skew")
    column = _column(config, train)
    if column not in train.column_names:
        known = ", ".join(train.column_names)
        raise InputError("data.partition.column", wanted, f"there is no such column; columns: {known}")
    values: list[Any] = train[column][:]
    for row, value in enumerate(values):
        if value is None or value != value or not isinstance(value, str | int | float):
            remedy = f"training example {row + 1} has {value!r} there; every example needs a word or a number"
            raise InputError("data.partition.column", wanted, remedy)
    return np.array(values)


def _partitioner(config: Config) -> Partitioner:
    partition, seed = config.data.partition, config.run.seed
    # Checked when the config was read: every kind but natural has a number of clients.
    clients = partition.clients or 1
    if partition.kind == "iid":
        return IidPartitioner(clients)
    if partition.kind == "size":
        return _SIZE_SKEW[partition.size_skew](clients)
    if partition.kind == "dirichlet":
        least = partition.min_examples
        return DirichletPartitioner(clients, "value", partition.alpha, least, self_balancing=False, seed=seed)
    if partition.kind == "pathological":
        # The mode of the paper: every class is used as soon as there are as many clients as classes.
        mode = "first-deterministic"
        return PathologicalPartitioner(clients, "value", partition.classes_per_client, mode, seed=seed)
    if partition.kind == "shard":
        return ShardPartitioner(clients, "value", num_shards_per_partition=partition.shards_per_client, seed=seed)
    return NaturalIdPartitioner("value")


def _divide(partitioner: Partitioner, table: datasets.Dataset) -> list[np.ndarray]:
    partitioner.dataset = table
    # flwr-datasets warns of every retry and draws a progress bar; both would only repeat what an error says.
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        first = partitioner.load_partition(0)
        count = partitioner.num_partitions
        indices: dict[int, Any] | None = getattr(partitioner, "_partition_id_to_indices", None)
        if isinstance(partitioner, IidPartitioner):
            # The same pieces; selecting a table for each of 100,000 clients takes a minute.
            parts = np.array_split(partitioner.dataset["row"][:], count)
        elif indices is None:
            parts = [first["row"][:]] + [partitioner.load_partition(client)["row"][:] for client in range(1, count)]
        else:
            # The partitioner may have sorted its table; reading one column beats selecting a table for each client.
            rows = partitioner.dataset["row"][:]
            parts = [rows[np.asarray(indices[client], np.int64)] for client in range(count)]
    return [np.sort(np.asarray(part, np.int64)) for part in parts]


def _largest(config: Config, clients: list[np.ndarray]) -> list[np.ndarray]:
    """Keep the groups that are large enough, at most ``clients`` of them, in their order."""
    partition = config.data.partition
    fitting = [number for number, members in enumerate(clients) if len(members) >= partition.min_examples]
    if not fitting:
        largest = max(len(members) for members in clients)
        remedy = f"no group has so many examples (the largest has {largest}); lower it"
        raise InputError("data.partition.min_examples", partition.min_examples, remedy)
    fitting.sort(key=lambda number: -len(clients[number]))
    return [clients[number] for number in sorted(fitting[: partition.clients])]


def _impossible(config: Config, why: str) -> InputError:
    partition = config.data.partition
    why = f"every client needs {partition.min_examples} or more examples ({why.split('. ')[0].rstrip('.')})"
    if partition.kind == "dirichlet":
        return InputError("data.partition.alpha", partition.alpha, f"{why}; raise it or take fewer clients")
    if partition.kind == "pathological":
        remedy = f"{why}; take fewer clients, lower classes_per_client, or take another run.seed"
        return InputError("data.partition.clients", partition.clients, remedy)
    if partition.kind == "shard":
        remedy = f"{why}; take fewer clients or lower shards_per_client"
        return InputError("data.partition.clients", partition.clients, remedy)
    if partition.kind == "size":
        remedy = f"{why}; take fewer clients or a milder size_skew"
        return InputError("data.partition.clients", partition.clients, remedy)
    return InputError("data.partition.clients", partition.clients, f"{why}; take fewer clients")
