"""Partitions are disjoint, complete where they claim to be, and a function of the seed."""

import datasets
import numpy as np
import pytest
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import load_config
from fedlora.data.partition import client_names, partition_rows
from fedlora.data.partition_plot import plot_partition
from fedlora.errors import InputError

LABELS = ["a", "b", "c", "d"]


def config(seed=0, **partition):
    return load_config(
        {
            "run": {"seed": seed},
            "model": {"name": "x"},
            "data": {"name": "x", "partition": partition},
            "method": {"name": "fedit"},
        }
    )


def table(n, seed=0):
    rng = np.random.default_rng(seed)
    owners = [f"owner {owner:02d}" for owner in rng.integers(0, 12, n)]
    return datasets.Dataset.from_dict({"label": rng.integers(0, 4, n), "owner": owners})


KINDS = [
    ({"kind": "iid"}, True),
    ({"kind": "dirichlet", "alpha": 1.0}, True),
    ({"kind": "dirichlet", "alpha": 1.0, "column": "owner"}, True),
    ({"kind": "pathological", "classes_per_client": 2}, True),
    ({"kind": "shard", "shards_per_client": 3}, False),
    ({"kind": "size", "size_skew": "linear"}, True),
    ({"kind": "size", "size_skew": "square"}, True),
    ({"kind": "size", "size_skew": "exponential"}, True),
    ({"kind": "natural", "column": "owner"}, False),
]


@pytest.mark.parametrize(("kind", "complete"), KINDS)
@given(clients=st.integers(4, 6), n=st.integers(400, 500), seed=st.integers(0, 2**63 - 1))
def test_partitions_are_disjoint_and_follow_the_seed(kind, complete, clients, n, seed):
    train = table(n)
    found = partition_rows(config(seed, clients=clients, **kind), train, LABELS)
    again = partition_rows(config(seed, clients=clients, **kind), train, LABELS)
    assert len(found) == clients
    for rows, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(rows, other)
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
        assert len(rows) > 0
    everything = np.concatenate(found)
    assert len(np.unique(everything)) == len(everything)
    if complete:
        assert len(everything) == n


@pytest.mark.parametrize("kind", ["iid", "size", "dirichlet", "shard"])
def test_another_seed_gives_another_partition(kind):
    first, other = (partition_rows(config(seed, kind=kind, clients=4), table(200), LABELS) for seed in (0, 1))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first, other, strict=True))


def test_the_kinds_do_what_they_say():
    train = table(1000)
    labels = np.array(train["label"][:])
    for rows in partition_rows(config(kind="pathological", clients=8, classes_per_client=2), train, LABELS):
        assert len(np.unique(labels[rows])) == 2
    sizes = [len(rows) for rows in partition_rows(config(kind="size", clients=4), train, LABELS)]
    assert sizes == [100, 200, 300, 400]
    iid = partition_rows(config(kind="iid", clients=3), train, LABELS)
    assert [len(rows) for rows in iid] == [334, 333, 333]
    assert np.diff(iid[0]).max() > 1


@given(clients=st.integers(1, 12), n=st.integers(12, 60), seed=st.integers(0, 9))
def test_iid_is_that_of_flwr_datasets(clients, n, seed):
    rows = np.random.default_rng([seed, 3]).permutation(n)
    theirs = IidPartitioner(clients)
    theirs.dataset = datasets.Dataset.from_dict({"row": rows})
    for client, mine in enumerate(partition_rows(config(seed, kind="iid", clients=clients), table(n), LABELS)):
        assert mine.tolist() == sorted(theirs.load_partition(client)["row"])


def test_dirichlet_is_that_of_flwr_datasets():
    train = table(300).add_column("row", np.arange(300))
    partitioner = DirichletPartitioner(5, "label", 0.5, 1, self_balancing=False, seed=3)
    partitioner.dataset = train
    found = partition_rows(config(3, kind="dirichlet", clients=5, alpha=0.5), train, LABELS)
    for client, rows in enumerate(found):
        np.testing.assert_array_equal(rows, np.sort(partitioner.load_partition(client)["row"][:]))


def test_natural_keeps_the_largest_groups_in_the_order_of_their_names():
    sizes = {"d": 4, "a": 1, "c": 3, "b": 2}
    owners = [owner for owner, size in sizes.items() for _ in range(size)]
    train = datasets.Dataset.from_dict({"label": [0, 1] * 5, "owner": owners})
    natural = {"kind": "natural", "column": "owner"}
    for partition, names in [
        ({}, ["a", "b", "c", "d"]),
        ({"clients": 2}, ["c", "d"]),
        ({"clients": 99}, ["a", "b", "c", "d"]),
        ({"min_examples": 3}, ["c", "d"]),
    ]:
        wanted = config(**natural, **partition)
        found = partition_rows(wanted, train, LABELS[:2])
        assert client_names(wanted, train, found) == names
        assert [len(rows) for rows in found] == [sizes[name] for name in names]


@pytest.mark.parametrize(
    ("field", "partition"),
    [
        ("data.partition.clients", {"clients": 101}),
        ("data.partition.clients", {"clients": 60, "min_examples": 2}),
        ("data.partition.alpha", {"kind": "dirichlet", "alpha": 0.001, "clients": 50}),
        ("data.partition.classes_per_client", {"kind": "pathological", "clients": 4, "classes_per_client": 5}),
        ("data.partition.clients", {"kind": "pathological", "clients": 90, "classes_per_client": 2}),
        ("data.partition.clients", {"kind": "shard", "clients": 90, "shards_per_client": 4}),
        ("data.partition.clients", {"kind": "size", "size_skew": "exponential", "clients": 30}),
        ("data.partition.column", {"kind": "natural", "column": "nobody"}),
        ("data.partition.column", {"kind": "natural", "column": "gaps"}),
        ("data.partition.min_examples", {"kind": "natural", "column": "owner", "min_examples": 90}),
    ],
)
def test_mistakes_are_named(field, partition):
    train = table(100).add_column("gaps", ["x", None] * 50)
    with pytest.raises(InputError) as caught:
        partition_rows(config(**partition), train, LABELS)
    assert caught.value.field == field


def test_partitioning_says_nothing(capfd, recwarn):
    for kind in ({"kind": "natural", "column": "owner"}, {"kind": "dirichlet", "clients": 30, "alpha": 0.3}):
        partition_rows(config(**kind), table(400), LABELS)
    assert capfd.readouterr() == ("", "")
    assert not [warning for warning in recwarn if "partition" in str(warning.message)]


@pytest.mark.parametrize("clients", [1, 10, 1000])
@pytest.mark.parametrize("labels", [1, 4, 52])
def test_the_picture_is_drawn(tmp_path, clients, labels):
    counts = np.random.default_rng(0).integers(0, 9, (clients, labels))
    plot_partition(tmp_path / "a.png", counts, [str(label) for label in range(labels)])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
